// Runs the pieces on blocks of many sizes, with every buffer exactly as large as it must be, for the sanitizers.
// Only float32 and bfloat16 are built: the other types share their code.
#include <cstdio>
#include <random>
#include <vector>

#define EVENLY_ISA portable
#define EVENLY_TABLE pieces_portable
#define EVENLY_FEW_TYPES
#include "pieces.inl"

using namespace evenly;

namespace {

std::mt19937 generator(0);

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

std::vector<double> numbers(int64_t n) {
  std::vector<double> out(static_cast<size_t>(n), 0.5);
  out.shrink_to_fit();
  return out;
}

bool run_block(const Block& b) {
  const int64_t n = b.K0 * b.R0 * b.K1 * b.R1, K = b.K0 * b.K1;
  auto x = filled(n, b.dtype), g = filled(n, b.dtype), y = filled(n, b.dtype);
  auto first = numbers(K), second = numbers(K), m = numbers(K), gain = numbers(K), slope = numbers(K);
  const Pieces& p = pieces_portable;
  return p.sums(b, x.data(), nullptr, nullptr, first.data(), nullptr) == OK &&
         p.sums(b, x.data(), g.data(), m.data(), first.data(), second.data()) == OK &&
         p.combine(b, x.data(), nullptr, nullptr, nullptr, slope.data(), nullptr, y.data()) == OK &&
         p.combine(b, x.data(), g.data(), gain.data(), m.data(), slope.data(), m.data(), y.data()) == OK &&
         p.clip(b, x.data(), nullptr, m.data(), slope.data(), m.data(), 1.0, y.data()) == OK &&
         p.clip(b, x.data(), g.data(), nullptr, slope.data(), nullptr, 1.0, y.data()) == OK;
}

bool run_rows(int dtype, int64_t rows, int64_t channels, int64_t group) {
  const int64_t n = rows * channels;
  auto x = filled(n, dtype), dy = filled(n, dtype), out = filled(n, dtype);
  auto w = filled(channels, dtype), b = filled(channels, dtype), dw = w, db = b;
  auto one = filled(channels, dtype), two = one, three = one, four = one;
  auto kept = numbers(2 * channels);
  bool fine = true;
  for (int warmup : {0, 5}) {
    int64_t steps = 0;
    Power p{};
    p.dtype = p.wdtype = dtype, p.rows = rows, p.channels = channels, p.group = group, p.eps = 1e-5;
    p.x = x.data(), p.out = out.data(), p.weight = w.data(), p.bias = b.data(), p.kept = kept.data();
    p.running = one.data(), p.before = two.data(), p.steps = &steps, p.warmup = warmup, p.alpha_fwd = 0.9;
    fine = fine && pieces_portable.power_forward(p) == OK;
    p.running = nullptr;
    fine = fine && pieces_portable.power_forward(p) == OK && steps == 1;
    p.dy = dy.data(), p.state = three.data(), p.rate = 0.1, p.batch = warmup > 0;
    p.dweight = dw.data(), p.dbias = db.data();
    fine = fine && pieces_portable.power_backward(p) == OK;
    p.exact = 1, p.batch = 0, p.state = nullptr;
    fine = fine && pieces_portable.power_backward(p) == OK && pieces_portable.power_forward(p) == OK;
    p.exact = 0, p.state = three.data();
    p.out = nullptr, p.weight = nullptr, p.dweight = nullptr, p.dbias = nullptr;
    fine = fine && pieces_portable.power_backward(p) == OK;
  }
  fine = fine && pieces_portable.products(dtype, rows, channels, x.data(), dy.data(), numbers(3 * rows).data(), rows) == OK;
  const auto slopes = numbers(rows);
  fine = fine && pieces_portable.advance(dtype, rows, channels, dy.data(), 0.5, slopes.data(), out.data()) == OK;

  Online o{};
  o.dtype = o.wdtype = dtype, o.steps = rows, o.channels = channels, o.group = group;
  o.alpha_fwd = 0.99, o.alpha_bkw = 0.9, o.eps = 1e-5, o.guard_eps = 1e-5;
  o.x = x.data(), o.out = out.data(), o.weight = w.data(), o.bias = b.data(), o.kept = kept.data();
  o.mean = one.data(), o.var = two.data(), o.mean_before = three.data(), o.var_before = four.data();
  fine = fine && pieces_portable.online_forward(o) == OK;
  o.dy = dy.data(), o.u = one.data(), o.v = two.data(), o.dweight = dw.data(), o.dbias = db.data();
  fine = fine && pieces_portable.online_backward(o) == OK;
  o.out = nullptr, o.weight = nullptr, o.bias = nullptr, o.dweight = nullptr, o.dbias = nullptr;
  fine = fine && pieces_portable.online_backward(o) == OK;
  o.group = 0, o.limit = 1.5, o.out = out.data(), o.mean = nullptr, o.var = nullptr;
  fine = fine && pieces_portable.online_forward(o) == OK && pieces_portable.online_backward(o) == OK;

  auto m = numbers(rows * channels), s = numbers(rows * channels), results = numbers(5 * rows * channels);
  OnlineNumbers f{};
  f.wdtype = dtype, f.steps = rows, f.channels = channels, f.positions = 3, f.group = group;
  f.alpha_fwd = 0.99, f.alpha_bkw = 0.9, f.eps = 1e-5, f.guard_eps = 1e-5;
  f.m = m.data(), f.s = s.data(), f.weight = w.data(), f.bias = b.data(), f.out = results.data(), f.kept = kept.data();
  f.mean = one.data(), f.var = two.data(), f.mean_before = three.data(), f.var_before = four.data();
  fine = fine && pieces_portable.online_numbers(f) == OK;
  f.mean = f.var = f.mean_before = f.var_before = nullptr;
  fine = fine && pieces_portable.online_numbers(f) == OK;
  f.total_g = m.data(), f.total_gd = s.data(), f.u = one.data(), f.v = two.data();
  f.dweight = dw.data(), f.dbias = db.data();
  return fine && pieces_portable.online_control(f) == OK;
}

}  // namespace

int main() {
  const int64_t blocks[][4] = {
      {7, 1, 1, 33},   {3, 1, 1, 196},   {1, 5, 7, 49},   {1, 5, 16, 9},    {3, 50, 4, 2},    {1, 77, 3, 1},
      {1, 200, 96, 1}, {2, 40, 70, 1},   {1, 1, 1, 9001}, {1, 4099, 5, 1},  {40, 30, 4, 3},   {5, 1, 1, 1},
      {1, 2, 1, 1},    {1, 1000, 33, 4}, {17, 1, 1, 131}, {1, 3, 2, 20000}, {300, 4, 20, 1},
  };
  const int64_t rows[][3] = {{1, 1, 1}, {7, 15, 5}, {40, 130, 65}, {130, 256, 64}, {3, 600, 600}, {2000, 3, 1}, {300, 300, 0}};
  int done = 0;
  for (int dtype : {F32, BF16}) {
    for (const auto& s : blocks) {
      if (!run_block({dtype, s[0], s[1], s[2], s[3]})) return 1;
      ++done;
    }
    for (const auto& s : rows) {
      if (!run_rows(dtype, s[0], s[1], s[2])) return 1;
      ++done;
    }
  }
  const auto v = std::vector<float>(70 * 300, 1.0f), start = std::vector<float>(300, 0.0f);
  auto before = v, last = start;
  for (const float* a : {static_cast<const float*>(nullptr), v.data()})
    if (pieces_portable.scan(F32, 70, 300, a, 0.5, v.data(), start.data(), before.data(), last.data()) != OK) return 1;
  std::printf("%d problems\n", done);
  return 0;
}
