// Forward on Hopper: wgmma fed by TMA. Two warps produce, two or three warpgroups of 64 packed rows consume.
//
//   planner:   takes row tiles (items) from a counter, finds the blocks of 32 keys that each needs (ballots over their
//              bounds) and hands them on, 256 blocks a round
//   loader:    gathers needed blocks, side by side or not, into tiles of kBlocks; sends Q, K and V of them through rings;
//              with K of a partial block, where the rows that see its keys end
//   consumer:  S(next) = Q K^T and O += P V issued; while these run, softmax of S(next); then O is rescaled
//
// The consumers take turns in a ring (named barriers): one does its softmax while the others' products run. A consumer goes
// from tile to tile without regard to items: the scores of an item's first tile are computed while the values of the last
// tile of the item before are added up. Q of the next item must be there by then:
//
//   two buffers:  Q comes while the item before is computed. O is staged in the place of the item's own Q, so that one is
//                 free once the item is finished.
//   one buffer:   (where two do not fit) O is staged elsewhere, 64 columns at a time, and Q is free once the scores of the
//                 item's last tile are there; the next Q comes during the softmax of these.
//
// Nobody waits in a circle: whatever frees the slot that the loader waits for needs nothing but what it has sent before.
// With one buffer the wait for Q ends with the scores of the last tile, for which the consumers need K of that tile, V of
// the tile before it, and each other's turns, which no consumer holds while it waits for Q.
#pragma once

#include <type_traits>
#include <utility>

#include "forward_producer.cuh"

namespace tree_attn::hopper {

// The softmax of one consumer's 64 rows. A thread holds two of them, 8 apart.
template <typename Tiles>
struct Softmax {
  static constexpr int kKeyTiles = Tiles::kKeys / 8;
  float peak[2], sum[2];  // what scores are compared with, and the sum of probabilities, of this thread's columns alone

  __device__ __forceinline__ void clear() {
    peak[0] = peak[1] = negative_infinity();
    sum[0] = sum[1] = 0.f;
  }

  // Scores become probabilities (not yet divided). `correction` is what the sums so far must be multiplied with; returns
  // whether that is not 1 for a row of the warp. The peak follows the largest score only when that is `slack` above it:
  // probabilities up to 2^8 are as exact as those up to 1, and most tiles leave the sums as they are.
  __device__ __forceinline__ bool update(float (&s)[kKeyTiles][4], float log2_scale, float slack, float (&correction)[2]) {
    bool raised = false;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float high = s[0][2 * h];
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) high = fmaxf(high, fmaxf(s[n][2 * h], s[n][2 * h + 1]));
      high = fmaxf(high, __shfl_xor_sync(~0u, high, 1));
      high = fmaxf(high, __shfl_xor_sync(~0u, high, 2));
      const bool raise = high > peak[h] + slack;
      const float before = peak[h] * log2_scale;
      if (raise) peak[h] = high;
      const float shift = peak[h] == negative_infinity() ? 0.f : peak[h] * log2_scale;
      correction[h] = raise ? exp2_approx(before - shift) : 1.f;
      raised |= raise;
      float total = 0.f;
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          s[n][2 * h + c] = exp2_approx(s[n][2 * h + c] * log2_scale - shift);
          total += s[n][2 * h + c];
        }
      sum[h] = sum[h] * correction[h] + total;
    }
    return __any_sync(~0u, raised);
  }
};

// Scores of pairs that the mask hides become -inf, in block kIndex of a tile, whose first key is `first_key`.
template <typename Tiles, bool kPlain, int kIndex>
__device__ __forceinline__ void mask_block(float (&s)[Tiles::kKeys / 8][4], const Mask& mask, const int* row_end,
                                           const int (&tokens)[2], int first_key, int n_keys) {
  constexpr int kColTiles = Tiles::kBlock / 8;
  const int column = threadIdx.x % 4 * 2;
  const auto hide = [&](auto&& hidden) {  // hidden(its scores, column, key, one past the last row that sees it)
#pragma unroll
    for (int i = 0; i < kColTiles; ++i) {
      const int2 ends = *reinterpret_cast<const int2*>(row_end + kIndex * Tiles::kBlock + i * 8 + column);
#pragma unroll
      for (int c = 0; c < 2; ++c) hidden(s[kIndex * kColTiles + i], c, first_key + i * 8 + column + c, c ? ends.y : ends.x);
    }
  };
  if constexpr (kPlain) {
    hide([&](float(&own)[4], int c, int key, int end) {
#pragma unroll
      for (int h = 0; h < 2; ++h)
        if (tokens[h] < key || tokens[h] >= end) own[2 * h + c] = negative_infinity();
    });
  } else {
    hide([&](float(&own)[4], int c, int key, int end) {
      const int begin = mask.row_begin == nullptr ? key : __ldg(mask.row_begin + min(key, n_keys - 1));
#pragma unroll
      for (int h = 0; h < 2; ++h)
        if (tokens[h] < begin || tokens[h] >= end) own[2 * h + c] = negative_infinity();
      if (mask.window == 0) return;
      const int oldest = __ldg(mask.k_depth + min(key, n_keys - 1)) + mask.window;
#pragma unroll
      for (int h = 0; h < 2; ++h)
        if (__ldg(mask.q_depth + tokens[h]) >= oldest) own[2 * h + c] = negative_infinity();
    });
  }
}

template <typename Tiles, int... kIndex>
__device__ __forceinline__ void mask_tile(float (&s)[Tiles::kKeys / 8][4], const Mask& mask, const int* row_end,
                                          const int (&tokens)[2], const typename Tiles::Tile& tile, int flags,
                                          int n_keys, std::integer_sequence<int, kIndex...>) {
  const auto hide = [&](auto plain) {
    ((flags & kPartial << kIndex
          ? mask_block<Tiles, decltype(plain)::value, kIndex>(s, mask, row_end, tokens, tile.first_key[kIndex], n_keys)
          : void()),
     ...);
  };
  // The most frequent case has code of its own, a fourth of the instructions.
  if (mask.row_begin == nullptr && mask.window == 0) hide(std::true_type{});
  else hide(std::false_type{});
}

template <typename Tiles>
__device__ __forceinline__ void consume(const ForwardArguments& args, typename Tiles::Smem& smem) {
  using T = typename Tiles::T;
  constexpr int kKeyTiles = Tiles::kKeys / 8, kValueTiles = Tiles::kValueDim / 8;
  constexpr int kStagedTiles = Tiles::kStagedInQ ? kValueTiles : 8;
  const Forward& call = args.call;
  const Sizes& sizes = call.sizes;
  const auto at = [](auto& x) { return smem_address(&x); };
  // From a shuffle, so that the compiler knows it to be the same for the whole warp.
  const int consumer = __shfl_sync(~0u, threadIdx.x / Tiles::kGroupThreads - 1, 0);
  // The turns: barrier 1 + c is consumer c's. The consumer before it in the ring opens it; that of the first is opened once
  // more, before the start, and taken once more in the end. The barriers after these are for a consumer by itself.
  const auto take_turn = [&] { named_sync(1 + consumer, 2 * Tiles::kGroupThreads); };
  const auto pass_turn = [&] { named_arrive(1 + (consumer + 1) % Tiles::kConsumers, 2 * Tiles::kGroupThreads); };
  if (consumer == Tiles::kConsumers - 1) pass_turn();

  Ring<Tiles::kStages> stage, value_stage;  // of keys, and of the values of the tile before
  Ring<Tiles::kQBuffers> buffer;  // of the tile whose scores are computed next
  float o[kValueTiles][4], s[kKeyTiles][4], correction[2];
#if __CUDACC_VER_MAJOR__ < 13
  // ptxas 12 puts products one after the other (C7515) where nothing defines the sums at first; ptxas 13 does not ask for it.
  for (auto& values : o) values[0] = values[1] = values[2] = values[3] = 0.f;
#endif
  uint32_t p[kKeyTiles / 2][4];
  Softmax<Tiles> softmax;
  int item, tokens[2];

  struct Place {
    int lane, warp_row;  // the first of this warp's 16 rows in the row tile
  };
  const auto place = [] {  // computed anew for each item: nothing that depends on it takes registers through the loop
    const uint32_t thread = recomputed(threadIdx.x);
    return Place{int(thread % kWarp), (int(thread / kWarp) - 4) * 16};
  };
  const auto release = [&](uint64_t& barrier) {  // by every warp, once all its lanes are finished
    warp_arrive(at(barrier), threadIdx.x % kWarp);
  };
  const auto release_q = [&](int flags) {  // once the scores are there
    if (!Tiles::kStagedInQ && flags & kLast) release(smem.q_empty[buffer.place()]);
  };
  const auto issue_scores = [&] {
    const uint32_t q_rows = at(smem.q[buffer.place()]) + consumer * Tiles::kGroupRows * 128;
    // Descriptors of the only buffer are always the same; kept in registers they would make others spill.
    const uint64_t q = descriptor_k_major(Tiles::kQBuffers == 1 ? recomputed(q_rows) : q_rows);
    const uint64_t k = descriptor_k_major(at(smem.k[stage.place()]));
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < Tiles::kDim / 16; ++step)
      Wgmma<T, Tiles::kKeys>::ss(s, descriptor_at(q, step / 4 * Tiles::kQSlab + step % 4 * 32),
                                 descriptor_at(k, step / 4 * Tiles::kKSlab + step % 4 * 32), step > 0);
    wgmma_commit();
  };
  const auto issue_values = [&](int from, bool accumulate) {
    const uint64_t v = descriptor_mn_major(at(smem.v[from]), Tiles::kKSlab);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < Tiles::kKeys / 16; ++step)
      Wgmma<T, Tiles::kValueDim>::template rs<true>(o, p[step], descriptor_at(v, step * 16 * 128),
                                                    step > 0 || accumulate);
    wgmma_commit();
  };
  const auto begin_item = [&] {
    item = smem.tiles[stage.place()].item;
    const int first_token = row_tile_of(args, item).first_token;
    const auto [lane, warp_row] = place();
#pragma unroll
    for (int h = 0; h < 2; ++h)
      tokens[h] = min(first_token + args.group.divide(warp_row + h * 8 + lane / 4), sizes.rows - 1);
    softmax.clear();
  };
  // Scores to probabilities, in place; whether the sums so far must be corrected.
  const auto to_probabilities = [&](int flags) {
    if (args.scaling.capped) {
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
        // Asked twice: behind one branch alone ptxas begins so many of them at once that others spill.
        if (n == kKeyTiles / 2 && !recomputed(args.scaling.capped)) break;
#pragma unroll
        for (int e = 0; e < 4; ++e) s[n][e] = tanh_accurate(args.scaling.inner_scale * s[n][e]);
      }
    }
    if (flags >= kPartial)
      mask_tile<Tiles>(s, call.mask, smem.row_end[stage.place()], tokens, smem.tiles[stage.place()], flags, sizes.keys,
                       std::make_integer_sequence<int, Tiles::kBlocks>{});
    release(smem.k_empty[stage.place()]);
    return softmax.update(s, args.scaling.log2_scale, args.slack, correction);
  };
  // The item's rows are complete: O registers -> smem (in the place of the item's Q, or apart) -> gmem. No product of
  // this consumer runs meanwhile, so there are no branches that differ between threads, and a row's address is computed once.
  const auto finish_item = [&](int finished, const Softmax<Tiles>& sums, int q_buffer) {
    const RowTile rows = row_tile_of(args, finished);
    const auto [lane, warp_row] = place();
    const int group = args.group.divisor;
    struct Row {
      int token, head;
      bool exists;
    };
    const auto row_of = [&](int row) {
      const int in_tile = args.group.divide(row), token = rows.first_token + in_tile;
      return Row{token, rows.kv_head * group + row - in_tile * group, in_tile < args.tile_tokens && token < sizes.rows};
    };
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const Row row = row_of(warp_row + h * 8 + lane / 4);
      const bool empty = sums.peak[h] == negative_infinity();
      float sum = sums.sum[h];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      const float peak = sums.peak[h] * args.scaling.log2_scale;
      float denominator = sum;
      if (call.sinks != nullptr) denominator += exp2_approx(call.sinks[row.exists ? row.head : 0] * kLog2e - peak);
      const float inverse = empty ? 0.f : __fdividef(1.f, denominator);
      if (lane % 4 == 0 && row.exists)
        call.lse[static_cast<int64_t>(row.head) * sizes.rows + row.token] = (peak + __log2f(sum)) * kLn2;  // -inf if empty
#pragma unroll
      for (int n = 0; n < kValueTiles; ++n) o[n][2 * h] *= inverse, o[n][2 * h + 1] *= inverse;
    }
    // If they go to this warp's rows of Q, those have been read: all warps of the consumer have waited for the scores, then
    // taken their turn.
    char* const staged = (Tiles::kStagedInQ ? smem.q[q_buffer] : smem.out) + warp_row * 128;
    const Row own = row_of(warp_row + lane % 16);
    T* const to_own = static_cast<T*>(call.out.data) + own.token * call.out.token_stride + own.head * call.out.head_stride;
    const auto own_address = reinterpret_cast<unsigned long long>(own.exists ? to_own : nullptr);
#pragma unroll
    for (int first = 0; first < kValueTiles; first += kStagedTiles) {
      constexpr int kChunks = kStagedTiles;  // of 16 bytes a row
#pragma unroll
      for (int n = 0; n < kStagedTiles && first + n < kValueTiles; n += 2) {
        const float(&low)[4] = o[first + n], (&high)[4] = o[first + n + 1];
        store_matrix_x4(at(*staged) + n / 8 * Tiles::kQSlab + lane % 16 * 128 + (((n % 8 + lane / 16) ^ (lane & 7)) << 4),
                        Element<T>::pack(low[0], low[1]), Element<T>::pack(low[2], low[3]),
                        Element<T>::pack(high[0], high[1]), Element<T>::pack(high[2], high[3]));
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < 16 * kChunks / kWarp; ++i) {
        const int index = i * kWarp + lane, chunk = index % kChunks, row = index / kChunks, column = (first + chunk) * 8;
        T* const to = reinterpret_cast<T*>(__shfl_sync(~0u, own_address, row));
        const int4 values = *reinterpret_cast<const int4*>(staged + chunk / 8 * Tiles::kQSlab + row * 128 +
                                                           ((chunk % 8 ^ (row & 7)) << 4));
        if (to != nullptr && column < sizes.value_dim) *reinterpret_cast<int4*>(to + column) = values;
      }
      if (!Tiles::kStagedInQ) __syncwarp();  // the next columns go to the same place
    }
    if (Tiles::kStagedInQ) {
      proxy_fence();
      release(smem.q_empty[q_buffer]);
    }
  };

  barrier_wait(at(smem.k_full[stage.place()]), stage.parity());
  int flags = smem.tiles[stage.place()].flags;
  if (!(flags & kEnd)) {
    begin_item();
    barrier_wait(at(smem.q_full[buffer.place()]), buffer.parity());
    take_turn();
    issue_scores();
    pass_turn();
    wgmma_wait<0>();
    release_q(flags);
    to_probabilities(flags);
    to_operand<T>(p, s);

    bool accumulate = false;  // does O hold values of the item already?
    for (;;) {
      const int q_buffer = buffer.place();
      const bool last = flags & kLast;
      ++stage.steps;
      barrier_wait(at(smem.k_full[stage.place()]), stage.parity());
      flags = smem.tiles[stage.place()].flags;
      if (last) {
        ++buffer.steps;
        if (flags & kEnd) {
          barrier_wait(at(smem.v_full[value_stage.place()]), value_stage.parity());
          issue_values(value_stage.place(), accumulate);
          wgmma_wait<0>();
          named_sync(1 + Tiles::kConsumers + consumer, Tiles::kGroupThreads);  // in place of a turn, see finish_item
          finish_item(item, softmax, q_buffer);
          break;
        }
        barrier_wait(at(smem.q_full[buffer.place()]), buffer.parity());
      }
      take_turn();
      issue_scores();
      barrier_wait(at(smem.v_full[value_stage.place()]), value_stage.parity());
      issue_values(value_stage.place(), accumulate);
      pass_turn();
      wgmma_wait<1>();
      release_q(flags);
      // The scores may be the first of the next item, while the last values of this one are added up.
      const int item_before = item;
      const Softmax<Tiles> softmax_before = softmax;
      if (last) begin_item();
      const bool correct = to_probabilities(flags);
      compute_now(softmax.sum[0]), compute_now(softmax.sum[1]);
      if (correct && !last) {
        wgmma_wait<0>();
#pragma unroll
        for (int n = 0; n < kValueTiles; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) o[n][e] *= correction[e / 2];
      }
      wgmma_wait<0>();  // behind a branch, across which ptxas moves no softmax
      release(smem.v_empty[value_stage.place()]);
      if (last) finish_item(item_before, softmax_before, q_buffer);
      accumulate = !last;
      ++value_stage.steps;
      to_operand<T>(p, s);
    }
  }
  if (consumer == 0) take_turn();  // leave the barriers even
}

template <typename Tiles>
__global__ void __launch_bounds__(Tiles::kThreads, 1)
    forward_kernel(const __grid_constant__ ForwardArguments args, const __grid_constant__ ForwardMaps maps) {
  extern __shared__ __align__(1024) char raw[];
  auto& smem = *reinterpret_cast<typename Tiles::Smem*>(raw);
  if (threadIdx.x == 0) {
    constexpr int kReleases = Tiles::kConsumers * Tiles::kGroupThreads / kWarp * kWarpArrivals;
    for (const CUtensorMap* map : {&maps.q, &maps.k, &maps.v, &maps.k_tile, &maps.v_tile}) prefetch_map(map);
    for (int i = 0; i < Tiles::kQBuffers; ++i) {
      barrier_init(smem_address(&smem.q_full[i]), 1);
      barrier_init(smem_address(&smem.q_empty[i]), kReleases);
    }
    for (int i = 0; i < Tiles::kStages; ++i) {
      barrier_init(smem_address(&smem.k_full[i]), kWarp + 1);  // of every lane, its row ends; of one, all else
      barrier_init(smem_address(&smem.v_full[i]), 1);
      barrier_init(smem_address(&smem.k_empty[i]), kReleases);
      barrier_init(smem_address(&smem.v_empty[i]), kReleases);
    }
    for (int i = 0; i < Tiles::kRounds; ++i) {
      barrier_init(smem_address(&smem.round_full[i]), kWarpArrivals);
      barrier_init(smem_address(&smem.round_empty[i]), kWarpArrivals);
    }
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < Tiles::kGroupThreads) {
    registers_decrease<Tiles::kProducerRegisters>();
    if (threadIdx.x < kWarp) load<Tiles>(args, maps, smem);
    else if (threadIdx.x < 2 * kWarp) plan<Tiles>(args, smem);
  } else {
    registers_increase<Tiles::kConsumerRegisters>();
    consume<Tiles>(args, smem);
  }
}

}  // namespace tree_attn::hopper
