// Hopper's instructions, one for each function.
#pragma once

#include "../number.cuh"

namespace cce {

// A tensor map (CUtensorMap), encoded on the host and passed by value.
struct alignas(64) TensorMap {
  unsigned char opaque[128];
};

__device__ __forceinline__ uint32 shared_address(const void* p) {
  return static_cast<uint32>(__cvta_generic_to_shared(p));
}

// Barriers in shared memory.

__device__ __forceinline__ void mbarrier_init(uint32 barrier, uint32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

__device__ __forceinline__ void mbarrier_arrive(uint32 barrier, uint32 arrivals) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(arrivals)
               : "memory");
}

__device__ __forceinline__ void mbarrier_expect_bytes(uint32 barrier, uint32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// The same barrier of another block of the cluster. Without qualifiers: with them the arrival
// becomes a fence over all of device memory.
__device__ __forceinline__ uint32 map_to_block(uint32 address, uint32 block) {
  uint32 mapped;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(block));
  return mapped;
}

__device__ __forceinline__ void mbarrier_arrive_mapped(uint32 barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ bool mbarrier_try_wait(uint32 barrier, uint32 parity) {
  uint32 done;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}

__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Makes ordinary writes to shared memory visible to copies and to matrix instructions.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Barriers of some of a block's threads, by number.

template <int kNumber, int kThreads>
__device__ __forceinline__ void named_sync() {
  asm volatile("bar.sync %0, %1;" ::"n"(kNumber), "n"(kThreads) : "memory");
}

// The same for threads that come to it at different places of the code.
template <int kNumber, int kThreads>
__device__ __forceinline__ void named_sync_of_branches() {
  asm volatile("barrier.sync %0, %1;" ::"n"(kNumber), "n"(kThreads) : "memory");
}

template <int kNumber, int kThreads>
__device__ __forceinline__ void named_arrive() {
  asm volatile("bar.arrive %0, %1;" ::"n"(kNumber), "n"(kThreads) : "memory");
}

// A load that nothing behind it may overtake.
__device__ __forceinline__ int load_acquire(const int* from) {
  int value;
  asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}

// Clusters.

__device__ __forceinline__ uint32 rank_in_cluster() {
  uint32 rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Copies to shared memory.

constexpr uint64 kEvictFirst = 0x12F0000000000000ull;  // cache policies of the L2
constexpr uint64 kEvictLast = 0x14F0000000000000ull;

__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// A box of a matrix, from column x of row y on; its bytes count towards the barrier.
__device__ __forceinline__ void copy_box(uint32 to, const TensorMap& map, int x, int y,
                                         uint32 barrier, uint64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(x), "r"(y), "l"(policy)
      : "memory");
}

// The same to this place in each block of the cluster that the mask names.
__device__ __forceinline__ void copy_box_to_blocks(uint32 to, const TensorMap& map, int x, int y,
                                                   uint32 barrier, unsigned short mask,
                                                   uint64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster.L2::cache_hint [%0], [%1, {%3, %4}], [%2], %5, %6;" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(x), "r"(y), "h"(mask), "l"(policy)
      : "memory");
}

// From shared memory to memory; whole 16 bytes.
__device__ __forceinline__ void store_bulk(void* to, uint32 from, uint32 bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from),
               "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void commit_bulk() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
__device__ __forceinline__ void wait_for_bulk() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// 16 bytes; zeros where `bytes` is 0. The L2 fetches all 128 that others of the warp want the rest of.
__device__ __forceinline__ void copy_word(uint32 to, const void* from, uint32 bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}

// The same for a condition: zeros where `there` is 0.
__device__ __forceinline__ void copy_word_if(uint32 to, const void* from, uint32 there) {
  asm volatile(
      "{\n"
      ".reg .pred absent;\n"
      "setp.eq.u32 absent, %2, 0;\n"
      "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, absent;\n"
      "}" ::"r"(to),
      "l"(from), "r"(there)
      : "memory");
}

// The same without a condition.
__device__ __forceinline__ void copy_whole_word(uint32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

// Volatile, so that nothing is put together with it or moved past copies.
__device__ __forceinline__ uint32 xor_of_three(uint32 a, uint32 b, uint32 c) {
  uint32 result;
  asm volatile("lop3.b32 %0, %1, %2, %3, 0x96;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
}

__device__ __forceinline__ void trap_if_one(uint32 value) {
  asm volatile(
      "{\n"
      ".reg .pred one;\n"
      "setp.eq.u32 one, %0, 1;\n"
      "@one trap;\n"
      "}" ::"r"(value));
}

// The thread's copies of words so far count as one arrival when they are done.
__device__ __forceinline__ void arrive_after_words(uint32 barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// Registers of a thread, of which warp groups trade some.

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Matrix products of a warp group.

__device__ __forceinline__ void product_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void product_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int kPending>
__device__ __forceinline__ void product_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

#if CCE_DTYPE == 2
#define CCE_OPERAND "f16"
#else
#define CCE_OPERAND "bf16"
#endif

// A thread's 96 sums of a product, as registers and as operands.
#define CCE_SUMS_96 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
  " %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, " \
  " %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, " \
  " %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, " \
  " %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, " \
  " %90, %91, %92, %93, %94, %95}"
#define CCE_OPERANDS_96(of) \
  of(d[0]), of(d[1]), of(d[2]), of(d[3]), of(d[4]), of(d[5]), of(d[6]), of(d[7]), \
  of(d[8]), of(d[9]), of(d[10]), of(d[11]), of(d[12]), of(d[13]), of(d[14]), of(d[15]), \
  of(d[16]), of(d[17]), of(d[18]), of(d[19]), of(d[20]), of(d[21]), of(d[22]), of(d[23]), \
  of(d[24]), of(d[25]), of(d[26]), of(d[27]), of(d[28]), of(d[29]), of(d[30]), of(d[31]), \
  of(d[32]), of(d[33]), of(d[34]), of(d[35]), of(d[36]), of(d[37]), of(d[38]), of(d[39]), \
  of(d[40]), of(d[41]), of(d[42]), of(d[43]), of(d[44]), of(d[45]), of(d[46]), of(d[47]), \
  of(d[48]), of(d[49]), of(d[50]), of(d[51]), of(d[52]), of(d[53]), of(d[54]), of(d[55]), \
  of(d[56]), of(d[57]), of(d[58]), of(d[59]), of(d[60]), of(d[61]), of(d[62]), of(d[63]), \
  of(d[64]), of(d[65]), of(d[66]), of(d[67]), of(d[68]), of(d[69]), of(d[70]), of(d[71]), \
  of(d[72]), of(d[73]), of(d[74]), of(d[75]), of(d[76]), of(d[77]), of(d[78]), of(d[79]), \
  of(d[80]), of(d[81]), of(d[82]), of(d[83]), of(d[84]), of(d[85]), of(d[86]), of(d[87]), \
  of(d[88]), of(d[89]), of(d[90]), of(d[91]), of(d[92]), of(d[93]), of(d[94]), of(d[95])

// d = a b^T: 64 rows, 192 columns, a depth of 16.
__device__ __forceinline__ void begin_product_64x192x16(float (&d)[96], uint64 a, uint64 b) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n192k16.f32." CCE_OPERAND "." CCE_OPERAND " " CCE_SUMS_96
      ", %96, %97, p, 1, 1, 0, 0;\n}\n"
      : CCE_OPERANDS_96("=f")
      : "l"(a), "l"(b));
}

// The same, added to d; rows of a and b lie across the depth where kAcross and kOtherAcross are 1.
template <int kAcross = 0, int kOtherAcross = 0>
__device__ __forceinline__ void product_64x192x16(float (&d)[96], uint64 a, uint64 b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n192k16.f32." CCE_OPERAND "." CCE_OPERAND " " CCE_SUMS_96
      ", %96, %97, 1, 1, 1, %98, %99;\n"
      : CCE_OPERANDS_96("+f")
      : "l"(a), "l"(b), "n"(kAcross), "n"(kOtherAcross));
}

// The same of 128 columns, added to d where `add` is set.
template <int kAcross = 0, int kOtherAcross = 0>
__device__ __forceinline__ void product_64x128x16(float (&d)[64], uint64 a, uint64 b, int add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." CCE_OPERAND "." CCE_OPERAND " "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "
      " %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, "
      " %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, "
      " %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "%64, %65, p, 1, 1, %67, %68;\n}\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
        "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
        "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]),
        "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]),
        "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),
        "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
        "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]),
        "+f"(d[63])
      : "l"(a), "l"(b), "r"(add), "n"(kAcross), "n"(kOtherAcross));
}

// d = a b, added to d where `add` is set: 64 rows, 256 columns, a depth of 16; rows of b lie across the
// depth, and those of a where kAcross is 1.
template <int kAcross>
__device__ __forceinline__ void product_64x256x16(float (&d)[128], uint64 a, uint64 b, int add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." CCE_OPERAND "." CCE_OPERAND " "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "
      " %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, "
      " %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, "
      " %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, "
      " %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, "
      " %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, "
      " %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      " %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, "
      " %126, %127}, %128, %129, p, 1, 1, %131, 1;\n}\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
        "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
        "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]),
        "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]),
        "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),
        "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
        "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]),
        "+f"(d[63]), "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]),
        "+f"(d[70]), "+f"(d[71]), "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]),
        "+f"(d[77]), "+f"(d[78]), "+f"(d[79]), "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]),
        "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), "+f"(d[88]), "+f"(d[89]), "+f"(d[90]),
        "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]), "+f"(d[96]), "+f"(d[97]),
        "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]),
        "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]),
        "+f"(d[110]), "+f"(d[111]), "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]),
        "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]), "+f"(d[120]), "+f"(d[121]),
        "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])
      : "l"(a), "l"(b), "r"(add), "n"(kAcross));
}

// Matrix products of a warp: d += a b^T, 16 rows, 8 columns, a depth of 16. A lane's words of a are of rows
// lane / 4 and eight further on, the one, then the other, first of the lower half of the depth; of b of row
// lane / 4, the lower half first.
__device__ __forceinline__ void product_16x8x16(float (&d)[4], uint32 a, uint32 a_below, uint32 a_upper,
                                                uint32 a_below_upper, uint32 b, uint32 b_upper) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32." CCE_OPERAND "." CCE_OPERAND ".f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a), "r"(a_below), "r"(a_upper), "r"(a_below_upper), "r"(b), "r"(b_upper));
}

#undef CCE_OPERAND

__device__ __forceinline__ uint32 largest_of_three(uint32 a, uint32 b, uint32 c) {
  return __vimax3_u32(a, b, c);
}

// Functions of the special units; their errors are below 2^-22.

__device__ __forceinline__ float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float logarithm_to_two(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace cce
