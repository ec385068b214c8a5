// Runs the kernels on problems of many sizes, with every buffer exactly as large as it must be, for the sanitizers.
// Only float32 and bfloat16 are built: the other types share their code.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#define EVENLY_ISA portable
#define EVENLY_TABLE kernels_portable
#define EVENLY_FEW_TYPES
#include "kernels.inl"

using namespace evenly;

namespace {

std::mt19937 generator(0);

// Exactly n bytes on the heap, filled with small numbers of the type.
std::vector<unsigned char> filled(int64_t n, int dtype) {
  std::normal_distribution<float> normal(1, 2);
  std::vector<unsigned char> bytes(static_cast<size_t>(n) * (dtype == F32 ? 4 : 2));
  for (int64_t i = 0; i < n; ++i) {
    const float v = normal(generator);
    uint32_t u;
    std::memcpy(&u, &v, 4);
    const uint16_t h = static_cast<uint16_t>(u >> 16);
    if (dtype == F32)
      std::memcpy(bytes.data() + 4 * i, &v, 4);
    else
      std::memcpy(bytes.data() + 2 * i, &h, 2);
  }
  bytes.shrink_to_fit();
  return bytes;
}

// outer, div and size of a mask that varies with everything, along a run, or not along it; none for 0
std::vector<uint8_t> masked(Problem& p, int how) {
  const int64_t n = p.K0 * p.R0 * p.K1 * p.R1;
  p.mouter = n, p.mdiv = 1, p.msize = n;
  if (how == 2) p.msize = p.R1;
  if (how == 3) p.mdiv = p.K1 * p.R1, p.msize = p.K0 * p.R0;
  if (how == 4) p.mouter = p.R0 * p.K1 * p.R1, p.msize = p.R1;
  std::vector<uint8_t> mask(static_cast<size_t>(how == 4 ? p.K0 * p.R1 : p.msize));
  for (auto& flag : mask) flag = generator() % 3 != 0;
  return mask;
}

int run(Problem p, bool residual, int how) {
  const int64_t n = p.K0 * p.R0 * p.K1 * p.R1, K = p.K0 * p.K1;
  const int64_t bytes = kernels_portable.bits_bytes(p);
  if (bytes < 0) return 0;
  auto x = filled(n, p.dtype), dy = filled(n, p.dtype), r = filled(n, p.dtype);
  auto w = filled(p.wsize, p.wdtype), b = filled(p.wsize, p.wdtype);
  std::vector<unsigned char> y(x.size()), dx(x.size()), dr(x.size()), dw(w.size()), db(w.size());
  const bool five = how || p.scale >= SCALE_L1;
  std::vector<float> stats(static_cast<size_t>((five ? 5 : 3) * K)), mean(static_cast<size_t>(K)), var(static_cast<size_t>(K));
  std::vector<uint8_t> bits(static_cast<size_t>(bytes));
  const std::vector<uint8_t> mask = masked(p, how);
  if (how) p.mask = mask.data();
  p.relu_bits = p.act == ACT_RELU && residual;
  p.x = x.data(), p.y = y.data(), p.stats = stats.data();
  p.mean_out = mean.data(), p.var_out = var.data();
  if (p.wsize) p.weight = w.data(), p.bias = b.data();
  if (residual) p.residual = r.data();
  if (p.relu_bits) p.bits = bits.data();
  if (kernels_portable.forward(p) != OK) return -1;
  // Once more from the statistics that are there: the same bytes.
  Problem again = p;
  std::vector<unsigned char> once_more(x.size());
  again.ready = 1, again.relu_bits = 0, again.bits = nullptr, again.y = once_more.data();
  again.mean_out = again.var_out = nullptr;
  if (kernels_portable.forward(again) != OK || once_more != y) return -1;
  p.y = nullptr;
  p.dy = dy.data(), p.dx = dx.data();
  if (p.wsize) p.dweight = dw.data(), p.dbias = db.data();
  if (residual) p.dresidual = dr.data();
  if (p.relu_bits) p.residual = nullptr;
  return kernels_portable.backward(p) == OK ? 1 : -1;
}

}  // namespace

int main() {
  const int64_t sizes[][6] = {
      // K0, R0, K1, R1, wdiv, wsize
      {7, 1, 1, 33, 1, 33},    {3, 1, 1, 196, 49, 12},  {1, 5, 7, 49, 49, 7},    {1, 5, 16, 9, 9, 16},
      {3, 50, 4, 2, 1, 8},     {1, 77, 3, 1, 1, 3},     {1, 200, 96, 1, 1, 96},  {2, 40, 70, 1, 1, 70},
      {1, 1, 1, 70001, 1, 1},  {3, 1, 1, 27, 3, 9},     {1, 3, 2, 5001, 5001, 2}, {4, 1, 1, 20000, 20000, 4},
      {64, 1, 1, 8, 1, 8},     {1, 4099, 5, 1, 1, 1},   {2, 1, 1, 40000, 1, 40000}, {6, 3, 2, 50, 50, 2},
      {400, 1, 1, 64, 1, 64},  {1, 1000, 33, 16, 16, 33}, {40, 30, 4, 3, 1, 12},  {5, 1, 1, 1, 1, 1},
      {1, 3, 5, 7, 1, 0},      {1, 2000, 17, 1, 1, 17}, {17, 1, 1, 131, 131, 17},
  };
  int done = 0;
  for (const auto& s : sizes)
    for (int dtype : {F32, BF16})
      for (int act : {ACT_NONE, ACT_RELU, ACT_SILU, ACT_GELU})
        for (int residual : {0, 1})
          for (int scale : {SCALE_NONE, SCALE_STD, SCALE_RMS, SCALE_L2, SCALE_L1, SCALE_MAX}) {
            Problem p{};
            p.K0 = s[0], p.R0 = s[1], p.K1 = s[2], p.R1 = s[3], p.wdiv = s[4], p.wsize = s[5];
            p.dtype = dtype, p.wdtype = done % 2 ? dtype : F32;
            p.act = act, p.scale = scale, p.center = scale != SCALE_RMS && scale != SCALE_L2;
            p.eps = 1e-5;
            p.far = done % 3 ? INT64_MAX : 0;
            for (int how : {0, 1 + done % 4}) {
              const int result = run(p, residual, how);
              if (result < 0) return 1;
              done += result;
            }
          }
  std::printf("%d problems\n", done);
  return 0;
}
