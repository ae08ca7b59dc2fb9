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

// -- named barriers among warpgroups ("bar, barrier") ------------------------------------------------------------------------

__device__ __forceinline__ void named_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
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

// What this thread has written to shared memory comes before what wgmma and TMA, past a barrier, do with it ("Memory
// Consistency Model: Proxies", "membar/fence").
__device__ __forceinline__ void proxy_fence() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

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

// D (64 x kCols, float32 registers) = A B, or += with accumulate: A 64 x 16 and B 16 x kCols from shared memory (ss), or A
// from registers (rs). kTransA, kTransB: the operand is MN-major.
template <typename T, int kCols>
struct Wgmma;

#define TREE_ATTN_ACC4(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define TREE_ATTN_ACC16(i) TREE_ATTN_ACC4(i), TREE_ATTN_ACC4(i + 1), TREE_ATTN_ACC4(i + 2), TREE_ATTN_ACC4(i + 3)
#define TREE_ATTN_ACC32(i) TREE_ATTN_ACC16(i), TREE_ATTN_ACC16(i + 4)

#define TREE_ATTN_WGMMA_64(ELEMENT, NAME)                                                                  \
  template <>                                                                                            \
  struct Wgmma<ELEMENT, 64> {                                                                            \
    template <bool kTransA = false, bool kTransB = false>                                                \
    static __device__ __forceinline__ void ss(float (&d)[8][4], uint64_t a, uint64_t b, bool accumulate) { \
      asm volatile(                                                                                      \
          "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"                                                    \
          "wgmma.mma_async.sync.aligned.m64n64k16.f32." NAME "." NAME " "                                  \
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "  \
          "%32, %33, p, 1, 1, %35, %36;\n}\n"                                                        \
          : TREE_ATTN_ACC32(0)                                                    \
          : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(kTransA)), "n"(int(kTransB)));                 \
    }                                                                                                    \
    template <bool kTransB = false>                                                                      \
    static __device__ __forceinline__ void rs(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b,    \
                                              bool accumulate) {                                         \
      asm volatile(                                                                                      \
          "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"                                                    \
          "wgmma.mma_async.sync.aligned.m64n64k16.f32." NAME "." NAME " "                                  \
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "  \
          "{%32, %33, %34, %35}, %36, p, 1, 1, %38;\n}\n"                                        \
          : TREE_ATTN_ACC32(0)                                                    \
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(int(kTransB))); \
    }                                                                                                    \
  };
TREE_ATTN_WGMMA_64(__half, "f16")
TREE_ATTN_WGMMA_64(__nv_bfloat16, "bf16")
#undef TREE_ATTN_WGMMA_64

#define TREE_ATTN_WGMMA_128(ELEMENT, NAME)                                                                  \
  template <>                                                                                            \
  struct Wgmma<ELEMENT, 128> {                                                                            \
    template <bool kTransA = false, bool kTransB = false>                                                \
    static __device__ __forceinline__ void ss(float (&d)[16][4], uint64_t a, uint64_t b, bool accumulate) { \
      asm volatile(                                                                                      \
          "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                                    \
          "wgmma.mma_async.sync.aligned.m64n128k16.f32." NAME "." NAME " "                                  \
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "  \
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "  \
          "%64, %65, p, 1, 1, %67, %68;\n}\n"                                                        \
          : TREE_ATTN_ACC32(0), TREE_ATTN_ACC32(8)                                                    \
          : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(kTransA)), "n"(int(kTransB)));                 \
    }                                                                                                    \
    template <bool kTransB = false>                                                                      \
    static __device__ __forceinline__ void rs(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b,    \
                                              bool accumulate) {                                         \
      asm volatile(                                                                                      \
          "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"                                                    \
          "wgmma.mma_async.sync.aligned.m64n128k16.f32." NAME "." NAME " "                                  \
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "  \
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "  \
          "{%64, %65, %66, %67}, %68, p, 1, 1, %70;\n}\n"                                        \
          : TREE_ATTN_ACC32(0), TREE_ATTN_ACC32(8)                                                    \
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(int(kTransB))); \
    }                                                                                                    \
  };
TREE_ATTN_WGMMA_128(__half, "f16")
TREE_ATTN_WGMMA_128(__nv_bfloat16, "bf16")
#undef TREE_ATTN_WGMMA_128

#undef TREE_ATTN_ACC4
#undef TREE_ATTN_ACC16
#undef TREE_ATTN_ACC32

}  // namespace tree_attn::hopper
