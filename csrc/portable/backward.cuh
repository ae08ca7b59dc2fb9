// Backward on mma.sync: one block takes kKeys keys of one key/value head and walks the rows that see them.
//
//   for each row tile:  S' = K Q^T;  P' = exp(S' - lse);  D' = V dO^T;  dS' = P' (D' - delta)
//                       dV += P' dO;  dK += dS' Q;  dQ[row tile] += dS'^T K
//
// Two warps share a group of keys: each computes S' and D' of half of the rows (keys x rows, transposed), P' and dS' meet
// in shared memory, and each adds up half of the columns of dK and dV. That is the division with the fewest bytes read
// from shared memory, which is what bounds this kernel. dQ is added up in float32 in global memory, in the order of the
// registers (contiguous for a warp), and converted at the end.
//
// Which keys a block takes against which rows is in backward_plan.cuh.
#pragma once

#include "../shared_memory.h"
#include "backward_plan.cuh"

namespace tree_attn::portable {

template <typename T_, int kDim_, int kValueDim_, int kKeys_, int kRows_, int kStages_>
struct BackwardTiles {
  using T = T_;
  static constexpr int kDim = kDim_, kValueDim = kValueDim_, kKeys = kKeys_, kRows = kRows_, kStages = kStages_;
  static constexpr int kKeyTiles = kDim > 128 ? 1 : 2;  // of 16 keys, in a group; dK and dV take the registers
  static constexpr int kGroupKeys = 16 * kKeyTiles, kHalfRows = kRows / 2;
  static constexpr int kDkTiles = kDim / 16, kDvTiles = kValueDim / 16;  // of 8 columns, in half of the columns
  static constexpr int kWarps = kKeys / kGroupKeys * 2, kThreads = kWarps * kWarp;
  static_assert(kHalfRows % 16 == 0 && kDkTiles % 2 == 0 && kDvTiles % 2 == 0);

  // How the warps divide dQ (kRows x kDim): 32 rows each if the columns then come out as multiples of 16.
  static constexpr bool kTallDq = kRows >= 32 && kDim % (kWarps / (kRows / 32) * 16) == 0;
  static constexpr int kDqRowTiles = kTallDq ? 2 : 1;
  static constexpr int kDqColumnGroups = kWarps / (kRows / (16 * kDqRowTiles));
  static constexpr int kDqColumns = kDim / kDqColumnGroups;
  static_assert(kDqColumns % 16 == 0 && kDqColumns * kDqColumnGroups == kDim);

  static constexpr int kKBytes = kKeys * kDim * 2, kVBytes = kKeys * kValueDim * 2;
  static constexpr int kQBytes = kRows * kDim * 2, kOBytes = kRows * kValueDim * 2, kStatBytes = kRows * 2 * 4;
  static constexpr int kStageBytes = kQBytes + kOBytes;
  static constexpr int kSBytes = kKeys * kRows * 2;
  static constexpr int kSmem = kKBytes + kVBytes + kStages * (kStageBytes + kStatBytes) + 2 * kSBytes;

  // Registers of one thread that are added up in global memory.
  static constexpr int kDqRegisters = kRows * kDim / kThreads;
  static constexpr int kDkRegisters = kKeys * kDim / kThreads, kDvRegisters = kKeys * kValueDim / kThreads;
};

template <typename Tiles>
__device__ __forceinline__ float* grad_q_of(const Workspace& work, int kv_head, int first_row) {
  const int warp = threadIdx.x / kWarp;
  return work.grad_q + (static_cast<int64_t>(kv_head) * work.padded_rows + first_row) * Tiles::kDim +
         warp * (Tiles::kDqRegisters * kWarp);
}

template <typename Tiles>
__device__ __forceinline__ float* grad_kv_of(const BackwardArguments& args, int kv_head, int tile) {
  const int warp = threadIdx.x / kWarp;
  const int64_t key = kv_head * Workspace::padded_keys(args.call.sizes) + int64_t{tile} * Tiles::kKeys;
  return args.work.grad_kv + key * (Tiles::kDim + Tiles::kValueDim) +
         warp * ((Tiles::kDkRegisters + Tiles::kDvRegisters) * kWarp);
}

// -- before -----------------------------------------------------------------------------------------------------------------

template <typename Tiles>
__global__ void __launch_bounds__(kPrepareWarps * kWarp, 4)
    prepare_kernel(const __grid_constant__ BackwardArguments args, PrepareBlocks blocks) {
  prepare<Tiles>(args, blocks, blockIdx.x, blockIdx.y, !args.call.deterministic);
}

// -- the products -----------------------------------------------------------------------------------------------------------

// dK and dV registers -> smem -> gmem.
template <typename Tiles>
__device__ __forceinline__ void store_grad_kv(const BackwardArguments& args, char* k_tile, char* v_tile, int kv_head,
                                              int k0, float (&dk)[Tiles::kKeyTiles][Tiles::kDkTiles][4],
                                              float (&dv)[Tiles::kKeyTiles][Tiles::kDvTiles][4]) {
  using T = typename Tiles::T;
  const Sizes& sizes = args.call.sizes;
  const int warp = threadIdx.x / kWarp, first_key = warp / 2 * Tiles::kGroupKeys, half = warp % 2;
#pragma unroll
  for (int i = 0; i < Tiles::kDkRegisters; ++i) (&dk[0][0][0])[i] *= args.scaling.scale;
  store_accumulators<T, Tiles::kDim>(k_tile, first_key, half * Tiles::kDkTiles, dk);
  store_accumulators<T, Tiles::kValueDim>(v_tile, first_key, half * Tiles::kDvTiles, dv);
  __syncthreads();
  TileCopy<T, Tiles::kDim, Tiles::kKeys, Tiles::kThreads>::store_keys(k_tile, args.call.grad_k, k0, sizes.keys, kv_head,
                                                                      sizes.head_dim);
  TileCopy<T, Tiles::kValueDim, Tiles::kKeys, Tiles::kThreads>::store_keys(v_tile, args.call.grad_v, k0, sizes.keys,
                                                                           kv_head, sizes.value_dim);
}

template <typename Tiles>
__global__ void __launch_bounds__(Tiles::kThreads, 1) backward_kernel(const __grid_constant__ BackwardArguments args) {
  using T = typename Tiles::T;
  constexpr int kDim = Tiles::kDim, kValueDim = Tiles::kValueDim, kKeys = Tiles::kKeys, kRows = Tiles::kRows;
  constexpr int kKeyTiles = Tiles::kKeyTiles, kHalfRows = Tiles::kHalfRows, kRowTiles = kHalfRows / 8;
  using CopyK = TileCopy<T, kDim, kKeys, Tiles::kThreads>;
  using CopyV = TileCopy<T, kValueDim, kKeys, Tiles::kThreads>;
  using CopyQ = TileCopy<T, kDim, kRows, Tiles::kThreads>;
  using CopyO = TileCopy<T, kValueDim, kRows, Tiles::kThreads>;
  using TileS = SmemTile<kRows>;

  const Backward& call = args.call;
  const Sizes& sizes = call.sizes;
  const Mask& mask = call.mask;
  const Workspace& work = args.work;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int first_key = warp / 2 * Tiles::kGroupKeys, half = warp % 2;  // half of the rows, and of the columns of dK, dV

  extern __shared__ __align__(1024) char smem[];
  char* const k_tile = smem;
  char* const v_tile = k_tile + Tiles::kKBytes;
  char* const q_tiles = v_tile + Tiles::kVBytes;
  char* const p_tile = q_tiles + Tiles::kStages * Tiles::kStageBytes;
  char* const s_tile = p_tile + Tiles::kSBytes;
  char* const stats = s_tile + Tiles::kSBytes;
  int& taken = *reinterpret_cast<int*>(p_tile);  // the item, while no row tile is computed
  const uint32_t k_smem = smem_address(k_tile), v_smem = smem_address(v_tile);
  const uint32_t p_smem = smem_address(p_tile), s_smem = smem_address(s_tile);

  for (;;) {
    __syncthreads();  // the item before is finished with shared memory
    if (threadIdx.x == 0) taken = atomicAdd(&work.plan->taken, 1);
    __syncthreads();
    const HeadItem found = item_taken(work, sizes, taken);
    if (!found.exists) return;
    const int4 item = found.item;
    const int kv_head = found.kv_head;
    const int tile = item.x, k0 = tile * kKeys, row_tiles = (item.z - item.y + kRows - 1) / kRows;
    const bool several = item.w;
    // Blocks side by side start at different rows of their band, so that they do not add to the same dQ at once.
    const auto row_of = [&](int i) { return item.y + (i + tile) % row_tiles * kRows; };

    const auto load_rows = [&](int first, int stage) {
      const uint32_t q_smem = smem_address(q_tiles) + stage * Tiles::kStageBytes;
      CopyQ::load_rows(q_smem, call.q, args.rows, first, kv_head, sizes.head_dim);
      CopyO::load_rows(q_smem + Tiles::kQBytes, call.grad_out, args.rows, first, kv_head, sizes.value_dim);
      constexpr int kVectors = kRows / 4;  // of 16 bytes in each statistic
      if (threadIdx.x < 2 * kVectors) {
        const int which = threadIdx.x / kVectors, i = threadIdx.x % kVectors;
        const float* from = (which ? work.delta : work.log2_sum) + static_cast<int64_t>(kv_head) * work.padded_rows;
        copy_async_16(smem_address(stats) + stage * Tiles::kStatBytes + which * kRows * 4 + i * 16,
                      from + first + i * 4, true);
      }
      copy_async_commit();
    };

    CopyK::load_keys(k_smem, call.k, k0, sizes.keys, kv_head, sizes.head_dim);
    CopyV::load_keys(v_smem, call.v, k0, sizes.keys, kv_head, sizes.value_dim);
    if (row_tiles > 0) load_rows(row_of(0), 0);
    else copy_async_commit();

    // The packed rows that see this thread's keys, and the tile's bounds for "needs no mask".
    const int group = args.rows.group.divisor;
    int2 seen[kKeyTiles][2];
    int key_depth[kKeyTiles][2];
#pragma unroll
    for (int m = 0; m < kKeyTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int key = k0 + first_key + m * 16 + h * 8 + lane / 4;
        const int2 tokens = key < sizes.keys ? rows_of_key(mask, key) : int2{0, 0};
        seen[m][h] = {tokens.x * group, min(tokens.y, sizes.rows) * group};
        key_depth[m][h] = mask.window && key < sizes.keys ? mask.k_depth[key] : 0;
      }
    const KeySpan keys = KeySpan::load<kKeys>(mask, k0, sizes.keys);
    const int full_from = keys.begin.high * group;
    const int full_to = k0 + kKeys <= sizes.keys ? keys.end.low * group : 0;

    float dk[kKeyTiles][Tiles::kDkTiles][4], dv[kKeyTiles][Tiles::kDvTiles][4];
    clear(dk);
    clear(dv);

    int stage = 0;
    for (int i = 0; i < row_tiles; ++i) {
      const int row0 = row_of(i);
      copy_async_wait<0>();
      __syncthreads();  // Q and dO are here (and K and V); the tile before is finished with the other stage and with dS
      if (Tiles::kStages == 2 && i + 1 < row_tiles) load_rows(row_of(i + 1), stage ^ 1);
      const uint32_t q_smem = smem_address(q_tiles) + stage * Tiles::kStageBytes, o_smem = q_smem + Tiles::kQBytes;
      const float* log2_sums = reinterpret_cast<const float*>(stats + stage * Tiles::kStatBytes);

      bool needed = true, full = row0 >= full_from && row0 + kRows <= full_to;
      if (mask.window) {
        const int last = min(row0 + kRows, args.rows.count) - 1;
        const RowSpan rows = row_span(mask, args.rows.token(row0), args.rows.token(last) + 1);
        needed = keys.needed(mask, rows);
        full = full && keys.full(mask, rows);
      }
      if (needed) {
        float s[kKeyTiles][kRowTiles][4], d[kKeyTiles][kRowTiles][4];  // keys x rows
        clear(s);
        clear(d);
        product_transposed<T, kDim, 8>(s, k_smem, first_key, q_smem, half * kHalfRows);
        product_transposed<T, kValueDim, 4>(d, v_smem, first_key, o_smem, half * kHalfRows);

#pragma unroll
        for (int n = 0; n < kRowTiles; ++n) {
          const int col = half * kHalfRows + n * 8 + (lane % 4) * 2;
          const float2 sums = *reinterpret_cast<const float2*>(log2_sums + col);
          const float2 deltas = *reinterpret_cast<const float2*>(log2_sums + kRows + col);
#pragma unroll
          for (int m = 0; m < kKeyTiles; ++m)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              float score = s[m][n][e], slope = 1.f;
              if (args.scaling.capped) {
                score = tanh_accurate(args.scaling.inner_scale * score);
                slope = 1.f - score * score;
              }
              const float p = exp2_approx(score * args.scaling.log2_scale - (e % 2 ? sums.y : sums.x));
              d[m][n][e] = p * (d[m][n][e] - (e % 2 ? deltas.y : deltas.x)) * slope;
              s[m][n][e] = p;
            }
        }
        if (!full) {
#pragma unroll
          for (int n = 0; n < kRowTiles; ++n)
#pragma unroll
            for (int m = 0; m < kKeyTiles; ++m)
#pragma unroll
              for (int e = 0; e < 4; ++e) {
                const int row = row0 + half * kHalfRows + n * 8 + (lane % 4) * 2 + e % 2;
                bool visible = row >= seen[m][e / 2].x && row < seen[m][e / 2].y;
                if (mask.window && visible)
                  visible = __ldg(mask.q_depth + args.rows.token(row)) - key_depth[m][e / 2] < mask.window;
                if (!visible) s[m][n][e] = 0.f, d[m][n][e] = 0.f;
              }
        }
        store_accumulators<T, kRows>(p_tile, first_key, half * kRowTiles, s);
        store_accumulators<T, kRows>(s_tile, first_key, half * kRowTiles, d);
        __syncthreads();  // P' and dS' are here
        product<T, kRows, kValueDim>(dv, p_smem, first_key, o_smem, half * Tiles::kDvTiles);
        product<T, kRows, kDim>(dk, s_smem, first_key, q_smem, half * Tiles::kDkTiles);

        if (!call.deterministic) {
          float dq[Tiles::kDqRowTiles][Tiles::kDqColumns / 8][4];
          clear(dq);
          const int dq_rows = warp / Tiles::kDqColumnGroups * Tiles::kDqRowTiles;  // in tiles of 16
          const int dq_chunk = warp % Tiles::kDqColumnGroups * (Tiles::kDqColumns / 8);
          const uint32_t s_lane = s_smem + TileS::offset(LaneColMajor::row(lane), LaneColMajor::chunk(lane));
          const uint32_t k_lane =
              rederive(k_smem + SmemTile<kDim>::offset(LaneRowMajor::row(lane), LaneRowMajor::chunk(lane)));
#pragma unroll
          for (int step = 0; step < kKeys / 16; ++step) {
            uint32_t a[Tiles::kDqRowTiles][4];
#pragma unroll
            for (int m = 0; m < Tiles::kDqRowTiles; ++m)
              load_matrix_x4_transposed(a[m], TileS::advance(s_lane, (dq_rows + m) * 2) + step * 16 * TileS::kPitch);
#pragma unroll
            for (int n = 0; n < Tiles::kDqColumns / 16; ++n) {
              uint32_t b[4];
              load_matrix_x4_transposed(
                  b, SmemTile<kDim>::advance(k_lane, dq_chunk + n * 2) + step * 16 * SmemTile<kDim>::kPitch);
#pragma unroll
              for (int m = 0; m < Tiles::kDqRowTiles; ++m) {
                Element<T>::mma(dq[m][2 * n], a[m], b[0], b[1]);
                Element<T>::mma(dq[m][2 * n + 1], a[m], b[2], b[3]);
              }
            }
          }
          add_registers<Tiles::kDqRegisters>(grad_q_of<Tiles>(work, kv_head, row0), &dq[0][0][0]);
        }
      }
      if (Tiles::kStages == 2) {
        stage ^= 1;
      } else if (i + 1 < row_tiles) {
        __syncthreads();  // everybody is finished with Q and dO
        load_rows(row_of(i + 1), 0);
      }
    }

    if (several) {
      float* to = grad_kv_of<Tiles>(args, kv_head, tile);
      add_registers<Tiles::kDkRegisters>(to, &dk[0][0][0]);
      add_registers<Tiles::kDvRegisters>(to + Tiles::kDkRegisters * kWarp, &dv[0][0][0]);
    } else {
      copy_async_wait<0>();
      __syncthreads();  // K and V have been read; their place takes dK and dV
      store_grad_kv<Tiles>(args, k_tile, v_tile, kv_head, k0, dk, dv);
    }
  }
}

// -- after: float32 sums to the type of the gradients -----------------------------------------------------------------------

template <typename Tiles>
__global__ void __launch_bounds__(Tiles::kThreads) finish_q_kernel(const __grid_constant__ BackwardArguments args) {
  using T = typename Tiles::T;
  __shared__ __align__(1024) char tile[Tiles::kQBytes];
  const int first = blockIdx.x * Tiles::kRows, kv_head = blockIdx.y, warp = threadIdx.x / kWarp;
  float dq[Tiles::kDqRowTiles][Tiles::kDqColumns / 8][4];
  read_registers<Tiles::kDqRegisters>(&dq[0][0][0], grad_q_of<Tiles>(args.work, kv_head, first));
#pragma unroll
  for (int i = 0; i < Tiles::kDqRegisters; ++i) (&dq[0][0][0])[i] *= args.scaling.scale;
  store_accumulators<T, Tiles::kDim>(tile, warp / Tiles::kDqColumnGroups * Tiles::kDqRowTiles * 16,
                                     warp % Tiles::kDqColumnGroups * (Tiles::kDqColumns / 8), dq);
  __syncthreads();
  TileCopy<T, Tiles::kDim, Tiles::kRows, Tiles::kThreads>::store_rows(tile, args.call.grad_q, args.rows, first, kv_head,
                                                                      args.call.sizes.head_dim);
}

// Key tiles in several bands.
template <typename Tiles>
__global__ void __launch_bounds__(Tiles::kThreads) finish_tiles_kernel(const __grid_constant__ BackwardArguments args) {
  const int tile = blockIdx.x, kv_head = blockIdx.y;
  if (bands_of(args.work.tile_rows[tile], args.work.plan->band_rows) < 2) return;
  extern __shared__ __align__(1024) char smem[];
  const float* const sums = grad_kv_of<Tiles>(args, kv_head, tile);
  float dk[Tiles::kKeyTiles][Tiles::kDkTiles][4], dv[Tiles::kKeyTiles][Tiles::kDvTiles][4];
  read_registers<Tiles::kDkRegisters>(&dk[0][0][0], sums);
  read_registers<Tiles::kDvRegisters>(&dv[0][0][0], sums + Tiles::kDkRegisters * kWarp);
  store_grad_kv<Tiles>(args, smem, smem + Tiles::kKBytes, kv_head, tile * Tiles::kKeys, dk, dv);
}

// -- launch -------------------------------------------------------------------------------------------------------------------

template <typename Tiles>
cudaError_t launch_backward_tiles(const Backward& call, cudaStream_t stream) {
  static_assert(Tiles::kKeys >= smallest_keys(Tiles::kDim), "the workspace is sized for so many");
  using T = typename Tiles::T;
  const BackwardArguments args(call, PackedRows(call.sizes), Tiles::kDim, Tiles::kValueDim, Tiles::kKeys);
  const Sizes& sizes = call.sizes;
  const unsigned key_tiles = (sizes.keys + Tiles::kKeys - 1) / Tiles::kKeys, kv_heads = sizes.kv_heads;

  int device = 0, processors = 0, blocks = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = allow_shared_memory<backward_kernel<Tiles>>(Tiles::kSmem);
  if (error == cudaSuccess)
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, backward_kernel<Tiles>, Tiles::kThreads, Tiles::kSmem);
  constexpr int kFinishSmem = Tiles::kKBytes + Tiles::kVBytes;
  if (error == cudaSuccess) error = allow_shared_memory<finish_tiles_kernel<Tiles>>(kFinishSmem);
  if (error != cudaSuccess) return error;

  const PrepareBlocks blocks_before = PrepareBlocks::of<Tiles>(args);
  prepare_kernel<Tiles>
      <<<dim3(blocks_before.count(), kv_heads), kPrepareWarps * kWarp, 0, stream>>>(args, blocks_before);
  const unsigned grid = min(static_cast<unsigned>(processors * max(blocks, 1)), args.work.max_items * kv_heads);
  backward_kernel<Tiles><<<grid, Tiles::kThreads, Tiles::kSmem, stream>>>(args);
  if (!call.deterministic) {
    finish_q_kernel<Tiles><<<dim3(args.work.padded_rows / Tiles::kRows, kv_heads), Tiles::kThreads, 0, stream>>>(args);
    finish_tiles_kernel<Tiles><<<dim3(key_tiles, kv_heads), Tiles::kThreads, kFinishSmem, stream>>>(args);
  }
  return cudaGetLastError();
}

}  // namespace tree_attn::portable
