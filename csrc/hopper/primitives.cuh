// The sm_90a instructions of the Hopper kernels, one function each; the PTX ISA section is named beside each.
#pragma once

#include <cstdint>
#include <cuda.h>

#include "../portable/primitives.cuh"

namespace tree_attn::hopper {

// -- mbarrier ("Parallel Synchronization and Communication Instructions: mbarrier") ---------------------------------------

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals));
}

// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;\n" ::); }

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}

// Arrivals of a warp: one of its lanes arrives, behind __syncwarp(), for what all have read and written. racecheck counts
// the reads of that lane alone, so for it the library is built with TREE_ATTN_FOR_RACECHECK and all lanes arrive.
#ifdef TREE_ATTN_FOR_RACECHECK
constexpr int kWarpArrivals = kWarp;
#else
constexpr int kWarpArrivals = 1;
#endif
__device__ __forceinline__ void warp_arrive(uint32_t barrier, int lane) {
  __syncwarp();
  if (kWarpArrivals == kWarp || lane == 0) barrier_arrive(barrier);
}

// Arrive, and complete only once `bytes` more have been copied in.
__device__ __forceinline__ void barrier_arrive_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits until the phase of this parity has completed.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n"
      "}\n" ::"r"(barrier), "r"(parity) : "memory");
}

// Where one is in a ring of kCount places: at which, and the parity of the phase of its barriers. A fresh barrier counts as
// one whose phase before is over: who fills the places waits for that, and so begins a round ahead of who reads them, or
// waits for parity() ^ 1.
template <int kCount>
struct Ring {
  unsigned steps = 0;
  static __device__ __forceinline__ Ring of_producer() { return {kCount}; }
  __device__ __forceinline__ int place() const { return steps % kCount; }
  __device__ __forceinline__ int parity() const { return steps / kCount & 1; }
};

// -- named barriers among warpgroups ("bar, barrier") ------------------------------------------------------------------------

__device__ __forceinline__ void named_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}

// -- words in global memory by which blocks wait for each other ("Memory Consistency Model") ------------------------------------

__device__ __forceinline__ int load_acquire(const int* at) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];\n" : "=r"(value) : "l"(at) : "memory");
  return value;
}
__device__ __forceinline__ void add_release(int* at, int value) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;\n" ::"l"(at), "r"(value) : "memory");
}

// -- TMA ("Data Movement: cp.async.bulk.tensor") -----------------------------------------------------------------------------

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(map) : "memory");
}

// A box at (column, head, token) of a (tokens, heads, dim) tensor, gmem -> smem; zeros outside of the tensor.
__device__ __forceinline__ void tma_load(uint32_t smem, const CUtensorMap* map, uint32_t barrier, int column, int head,
                                         int token) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];\n"
      ::"r"(smem), "l"(map), "r"(barrier), "r"(column), "r"(head), "r"(token) : "memory");
}

// `bytes` (a multiple of 16) in a row, gmem -> smem ("Data Movement: cp.async.bulk").
__device__ __forceinline__ void bulk_load(uint32_t smem, const void* gmem, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::"r"(smem),
               "l"(gmem), "r"(bytes), "r"(barrier)
               : "memory");
}

// `bytes` (a multiple of 16) of float32 or int in a row, smem -> added to gmem by the copy engine, and no registers or
// load/store unit held meanwhile ("Data Movement: cp.reduce.async.bulk"). Then a wait until what this thread has sent was
// read from smem, or until it has arrived ("cp.async.bulk.wait_group").
template <bool kIntegers>
__device__ __forceinline__ void bulk_add(void* gmem, uint32_t smem, int bytes) {
  if constexpr (kIntegers)
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.s32 [%0], [%1], %2;\n" ::"l"(gmem), "r"(smem),
                 "r"(bytes)
                 : "memory");
  else
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;\n" ::"l"(gmem), "r"(smem),
                 "r"(bytes)
                 : "memory");
  asm volatile("cp.async.bulk.commit_group;\n" ::: "memory");
}
__device__ __forceinline__ void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;\n" ::: "memory"); }
__device__ __forceinline__ void bulk_wait() { asm volatile("cp.async.bulk.wait_group 0;\n" ::: "memory"); }

// 4 bytes gmem -> smem, zero where `valid` is false ("Data Movement: cp.async"); and an arrival once the copies of this
// thread so far have come ("cp.async.mbarrier.arrive"), which racecheck does not follow: for it they are plain stores.
#ifdef TREE_ATTN_FOR_RACECHECK
__device__ __forceinline__ void copy_async_4(uint32_t smem, const void* gmem, bool valid) {
  const int value = valid ? *static_cast<const int*>(gmem) : 0;
  asm volatile("st.shared.s32 [%0], %1;\n" ::"r"(smem), "r"(value) : "memory");
}
__device__ __forceinline__ void copy_async_arrive(uint32_t barrier) { barrier_arrive(barrier); }
#else
__device__ __forceinline__ void copy_async_4(uint32_t smem, const void* gmem, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(smem), "l"(gmem), "r"(valid ? 4 : 0) : "memory");
}
__device__ __forceinline__ void copy_async_arrive(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];\n" ::"r"(barrier) : "memory");
}
#endif

// Four 8x8 matrices registers -> smem ("Warp-level Matrix Store: stmatrix"); lane l points to row l % 8 of matrix l / 8.
__device__ __forceinline__ void store_matrix_x4(uint32_t smem, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};\n" ::"r"(smem), "r"(a), "r"(b), "r"(c),
               "r"(d)
               : "memory");
}

// What this thread has written to shared memory comes before what wgmma and TMA, past a barrier, do with it ("Memory
// Consistency Model: Proxies", "membar/fence").
__device__ __forceinline__ void proxy_fence() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

// The same for global memory.
__device__ __forceinline__ void proxy_fence_global() { asm volatile("fence.proxy.async.global;\n" ::: "memory"); }

// -- registers of a warpgroup ("setmaxnreg") ---------------------------------------------------------------------------------

template <int kCount>
__device__ __forceinline__ void registers_increase() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void registers_decrease() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kCount));
}

// -- wgmma ("Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions") -------------------------------------------

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}

// `x` and what it depends on is computed before a wait that follows: without it the compiler puts arithmetic that is meant
// to run beside a product behind the wait for that product.
__device__ __forceinline__ void compute_now(float& x) { asm volatile("" : "+f"(x)); }

// `x`, but the compiler does not know that: it computes anew what depends on it instead of keeping that through a loop.
__device__ __forceinline__ uint32_t recomputed(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// A tile in shared memory is slabs of 64 columns (128 bytes a row, 128-byte swizzle, 1024 bytes for 8 rows). Descriptors
// ("Matrix Descriptor Format") of it:
//   K-major, the product runs along the columns: 8-row groups are 1024 bytes apart; a step of 16 columns is 32 bytes on.
//   MN-major, it runs along the rows: 64-column slabs are `slab` bytes apart, 8-row groups 1024.
__device__ __forceinline__ uint64_t descriptor_k_major(uint32_t smem) {
  return uint64_t{1} << 62 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 16 | ((smem & 0x3ffff) >> 4);
}
__device__ __forceinline__ uint64_t descriptor_mn_major(uint32_t smem, int slab) {
  return uint64_t{1} << 62 | uint64_t{1024 >> 4} << 32 | static_cast<uint64_t>(slab >> 4) << 16 | ((smem & 0x3ffff) >> 4);
}

// The same `bytes` further on: only the address is in the low bits, in units of 16 bytes, and never overflows its field.
__device__ __forceinline__ uint64_t descriptor_at(uint64_t descriptor, int bytes) { return descriptor + (bytes >> 4); }

// D (64 x kCols, float32 registers) = A B, or += with accumulate: A 64 x 16 and B 16 x kCols from shared memory (ss), or A
// from registers (rs). kTransA, kTransB: the operand is MN-major.
template <typename T, int kCols>
struct Wgmma;

// Operands of the instruction: the accumulators, and their places in its text, 16 a line.
#define TREE_ATTN_ACC4(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define TREE_ATTN_ACC16(i) TREE_ATTN_ACC4(i), TREE_ATTN_ACC4(i + 1), TREE_ATTN_ACC4(i + 2), TREE_ATTN_ACC4(i + 3)
#define TREE_ATTN_ACC32(i) TREE_ATTN_ACC16(i), TREE_ATTN_ACC16(i + 4)
#define TREE_ATTN_D16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define TREE_ATTN_D32 TREE_ATTN_D16 ", " "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TREE_ATTN_D48 TREE_ATTN_D32 ", " "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define TREE_ATTN_D64 TREE_ATTN_D48 ", " "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define TREE_ATTN_D80 TREE_ATTN_D64 ", " "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define TREE_ATTN_D96 TREE_ATTN_D80 ", " "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define TREE_ATTN_D112 TREE_ATTN_D96 ", " "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define TREE_ATTN_D128 TREE_ATTN_D112 ", " "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// COLS columns need N = COLS / 2 accumulators, %0 to %(N - 1); I0 to I6 are the places after them.
#define TREE_ATTN_WGMMA(ELEMENT, NAME, COLS, D, ACC, I0, I1, I2, I3, I4, I5, I6)                                       \
  template <>                                                                                                          \
  struct Wgmma<ELEMENT, COLS> {                                                                                        \
    template <bool kTransA = false, bool kTransB = false>                                                              \
    static __device__ __forceinline__ void ss(float (&d)[COLS / 8][4], uint64_t a, uint64_t b, bool accumulate) {      \
      asm volatile(                                                                                                    \
          "{\n.reg .pred p;\nsetp.ne.b32 p, %" I2 ", 0;\n"                                                             \
          "wgmma.mma_async.sync.aligned.m64n" #COLS "k16.f32." NAME "." NAME " {" D "}, %" I0 ", %" I1                 \
          ", p, 1, 1, %" I3 ", %" I4 ";\n}\n"                                                                          \
          : ACC                                                                                                        \
          : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(kTransA)), "n"(int(kTransB)));                               \
    }                                                                                                                  \
    template <bool kTransB = false>                                                                                    \
    static __device__ __forceinline__ void rs(float (&d)[COLS / 8][4], const uint32_t (&a)[4], uint64_t b,             \
                                              bool accumulate) {                                                       \
      asm volatile(                                                                                                    \
          "{\n.reg .pred p;\nsetp.ne.b32 p, %" I5 ", 0;\n"                                                             \
          "wgmma.mma_async.sync.aligned.m64n" #COLS "k16.f32." NAME "." NAME " {" D "}, {%" I0 ", %" I1 ", %" I2       \
          ", %" I3 "}, %" I4 ", p, 1, 1, %" I6 ";\n}\n"                                                                \
          : ACC                                                                                                        \
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(int(kTransB)));              \
    }                                                                                                                  \
  };

#define TREE_ATTN_A32 TREE_ATTN_ACC32(0)
TREE_ATTN_WGMMA(__half, "f16", 64, TREE_ATTN_D32, TREE_ATTN_A32, "32", "33", "34", "35", "36", "37", "38")
TREE_ATTN_WGMMA(__nv_bfloat16, "bf16", 64, TREE_ATTN_D32, TREE_ATTN_A32, "32", "33", "34", "35", "36", "37", "38")

#define TREE_ATTN_A48 TREE_ATTN_ACC32(0), TREE_ATTN_ACC16(8)
TREE_ATTN_WGMMA(__half, "f16", 96, TREE_ATTN_D48, TREE_ATTN_A48, "48", "49", "50", "51", "52", "53", "54")
TREE_ATTN_WGMMA(__nv_bfloat16, "bf16", 96, TREE_ATTN_D48, TREE_ATTN_A48, "48", "49", "50", "51", "52", "53", "54")

#define TREE_ATTN_A64 TREE_ATTN_ACC32(0), TREE_ATTN_ACC32(8)
TREE_ATTN_WGMMA(__half, "f16", 128, TREE_ATTN_D64, TREE_ATTN_A64, "64", "65", "66", "67", "68", "69", "70")
TREE_ATTN_WGMMA(__nv_bfloat16, "bf16", 128, TREE_ATTN_D64, TREE_ATTN_A64, "64", "65", "66", "67", "68", "69", "70")

#define TREE_ATTN_A80 TREE_ATTN_ACC32(0), TREE_ATTN_ACC32(8), TREE_ATTN_ACC16(16)
TREE_ATTN_WGMMA(__half, "f16", 160, TREE_ATTN_D80, TREE_ATTN_A80, "80", "81", "82", "83", "84", "85", "86")
TREE_ATTN_WGMMA(__nv_bfloat16, "bf16", 160, TREE_ATTN_D80, TREE_ATTN_A80, "80", "81", "82", "83", "84", "85", "86")

#define TREE_ATTN_A96 TREE_ATTN_ACC32(0), TREE_ATTN_ACC32(8), TREE_ATTN_ACC32(16)
TREE_ATTN_WGMMA(__half, "f16", 192, TREE_ATTN_D96, TREE_ATTN_A96, "96", "97", "98", "99", "100", "101", "102")
TREE_ATTN_WGMMA(__nv_bfloat16, "bf16", 192, TREE_ATTN_D96, TREE_ATTN_A96, "96", "97", "98", "99", "100", "101", "102")

#define TREE_ATTN_A128 TREE_ATTN_ACC32(0), TREE_ATTN_ACC32(8), TREE_ATTN_ACC32(16), TREE_ATTN_ACC32(24)
TREE_ATTN_WGMMA(__half, "f16", 256, TREE_ATTN_D128, TREE_ATTN_A128, "128", "129", "130", "131", "132", "133", "134")
TREE_ATTN_WGMMA(__nv_bfloat16, "bf16", 256, TREE_ATTN_D128, TREE_ATTN_A128, "128", "129", "130", "131", "132", "133", "134")

#undef TREE_ATTN_WGMMA
#undef TREE_ATTN_ACC4
#undef TREE_ATTN_ACC16
#undef TREE_ATTN_ACC32
#undef TREE_ATTN_A32
#undef TREE_ATTN_A48
#undef TREE_ATTN_A64
#undef TREE_ATTN_A80
#undef TREE_ATTN_A96
#undef TREE_ATTN_A128
#undef TREE_ATTN_D16
#undef TREE_ATTN_D32
#undef TREE_ATTN_D48
#undef TREE_ATTN_D64
#undef TREE_ATTN_D80
#undef TREE_ATTN_D96
#undef TREE_ATTN_D112
#undef TREE_ATTN_D128

}  // namespace tree_attn::hopper
