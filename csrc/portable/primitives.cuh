// The sm_80 instructions the portable kernels are made of, one function each, and the shared-memory layout they share.
// PTX ISA sections are named beside each.
#pragma once

#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace tree_attn {

constexpr int kWarp = 32;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

__device__ __forceinline__ float negative_infinity() { return __int_as_float(0xff800000); }

__device__ __forceinline__ uint32_t smem_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes gmem -> smem, zeros where `valid` is false ("Data Movement: cp.async", src-size operand).
__device__ __forceinline__ void copy_async_16(uint32_t smem, const void* gmem, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(smem), "l"(gmem), "r"(valid ? 16 : 0));
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;\n" ::); }

template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending));
}

// Four 8x8 matrices smem -> registers ("Warp-level Matrix Load: ldmatrix").
__device__ __forceinline__ void load_matrix_x4(uint32_t (&r)[4], uint32_t smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem));
}

__device__ __forceinline__ void load_matrix_x4_transposed(uint32_t (&r)[4], uint32_t smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem));
}

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// The 16-bit type's instructions: m16n8k16 with float32 accumulators ("Matrix multiply-accumulate: mma"), and packing.
template <typename T>
struct Element;

template <>
struct Element<__half> {
  static __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    __half2 h = __floats2half2_rn(low, high);
    return *reinterpret_cast<uint32_t*>(&h);
  }
  static __device__ __forceinline__ float2 unpack(uint32_t x) {
    return __half22float2(*reinterpret_cast<__half2*>(&x));
  }
};

template <>
struct Element<__nv_bfloat16> {
  static __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    __nv_bfloat162 h = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t*>(&h);
  }
  static __device__ __forceinline__ float2 unpack(uint32_t x) {
    return __bfloat1622float2(*reinterpret_cast<__nv_bfloat162*>(&x));
  }
};

// Hides where a value came from, so that what is derived from it is computed again in every iteration of a loop instead
// of being kept in registers, which the accumulators need more.
__device__ __forceinline__ uint32_t rederive(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// A tile of 16-bit elements in shared memory, kCols a row. 16-byte chunks are permuted inside each row so that the eight
// rows an ldmatrix reads (and the rows a warp writes) fall into eight different groups of banks.
template <int kCols>
struct SmemTile {
  static_assert(kCols % 32 == 0, "rows are a multiple of 64 bytes");
  static constexpr int kChunks = kCols / 8;
  static constexpr int kPitch = kCols * 2;

  static __device__ __forceinline__ int swizzle(int row) {
    return kCols % 64 == 0 ? (row & 7) : ((row >> 1) & 3);
  }
  // Bytes from the start of the tile to chunk `chunk` of row `row`.
  static __device__ __forceinline__ uint32_t offset(int row, int chunk) {
    return row * kPitch + ((chunk ^ swizzle(row)) << 4);
  }
  // The permutation stays inside windows of kWindow bytes, so from one chunk's address the others of its row are an xor
  // and an immediate away. `chunks` is even when `address` is of chunk 0 or 1, as for the steps of a product.
  static constexpr uint32_t kWindow = kCols % 64 == 0 ? 128 : 64;
  static __device__ __forceinline__ uint32_t advance(uint32_t address, int chunks) {
    const uint32_t bytes = chunks * 16;
    return (address ^ (bytes & (kWindow - 1))) + (bytes & ~(kWindow - 1));
  }
};

// Where a lane points for an ldmatrix.x4 over 16 rows x 16 columns: matrices in the order (rows 0-7, 8-15) x (columns 0-7,
// then 8-15), which is the order of the A operand of mma, and with .trans of two B operands.
struct LaneRowMajor {
  static __device__ __forceinline__ int row(int lane) { return lane & 15; }
  static __device__ __forceinline__ int chunk(int lane) { return lane >> 4; }
};

// The same with rows and columns of matrices exchanged: two B operands (16 rows of n, 16 of k) without .trans, and the
// A operand of a transposed tile with .trans.
struct LaneColMajor {
  static __device__ __forceinline__ int row(int lane) { return (lane & 7) + ((lane >> 4) << 3); }
  static __device__ __forceinline__ int chunk(int lane) { return (lane >> 3) & 1; }
};

// Division by a number of heads known at launch (Granlund and Montgomery 1994), exact for 0 <= n < 2^31.
struct FastDivisor {
  int divisor = 1;
  uint32_t multiplier = 1;
  int shift = 0;

  FastDivisor() = default;
  explicit FastDivisor(int d) : divisor(d) {
    while ((int64_t{1} << shift) < d) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - d)) / d + 1);
  }
  __device__ __forceinline__ int divide(int n) const {
    return static_cast<int>((__umulhi(multiplier, n) + static_cast<uint32_t>(n)) >> shift);
  }
};

}  // namespace tree_attn
