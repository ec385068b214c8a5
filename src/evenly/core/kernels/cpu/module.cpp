// The border with Python: tensors give their memory (tensors.h), everything else is a number.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "layout.h"
#include "ready.h"

using namespace evenly;

namespace {

// ---- the pieces of layers whose gradient is not autograd's (pieces.h)

void sums(int dtype, int64_t K0, int64_t R0, int64_t K1, int64_t R1, Memory x, Memory g, Memory m,
         Memory first, Memory second) {
  run(K0 * R0 * K1 * R1, [&] {
    return chosen.pieces->sums({dtype, K0, R0, K1, R1}, x.at, g.at, at<double>(m), at<double>(first),
                               at<double>(second));
  });
}

void products(int dtype, int64_t rows, int64_t n, Memory g, Memory x, Memory out, int64_t first,
              int64_t apart) {
  run(rows * n, [&] {
    return chosen.pieces->products(dtype, rows, n, g.at, x.at, at<double>(out) + first, apart);
  });
}

void advance(int dtype, int64_t rows, int64_t n, Memory g, double gain, Memory slope, Memory x) {
  run(rows * n, [&] {
    return chosen.pieces->advance(dtype, rows, n, g.at, gain, at<double>(slope), x.at);
  });
}

void combine(int dtype, int64_t K0, int64_t R0, int64_t K1, int64_t R1, Memory x, Memory g, Memory gain,
            Memory m, Memory slope, Memory shift, Memory y) {
  expect_large(y, bytes_of(dtype, K0 * R0 * K1 * R1));
  run(K0 * R0 * K1 * R1, [&] {
    return chosen.pieces->combine({dtype, K0, R0, K1, R1}, x.at, g.at, at<double>(gain), at<double>(m),
                                  at<double>(slope), at<double>(shift), y.at);
  });
}

void scan(int dtype, int64_t steps, int64_t width, Memory a, double constant, Memory v, Memory start,
         Memory before, Memory last) {
  run(steps * width, [&] {
    return chosen.pieces->scan(dtype, steps, width, a.at, constant, v.at, start.at,
                               before.at, last.at);
  });
}

void clip(int dtype, int64_t K0, int64_t R0, int64_t K1, int64_t R1, Memory x, Memory g, Memory m,
         Memory slope, Memory shift, double limit, Memory out) {
  expect_large(out, bytes_of(dtype, K0 * R0 * K1 * R1));
  run(K0 * R0 * K1 * R1, [&] {
    return chosen.pieces->clip({dtype, K0, R0, K1, R1}, x.at, g.at, at<double>(m), at<double>(slope),
                               at<double>(shift), limit, out.at);
  });
}

Power power_of(int dtype, int wdtype, int64_t rows, int64_t channels, int64_t group, double eps, bool exact,
               Memory x, Memory out, Memory weight, Memory kept) {
  Power p{};
  p.dtype = dtype, p.wdtype = wdtype;
  p.rows = rows, p.channels = channels, p.group = group, p.eps = eps, p.exact = exact;
  p.x = x.at, p.out = out.at, p.weight = weight.at, p.kept = at<double>(kept);
  expect_large(out, bytes_of(dtype, rows * channels));
  return p;
}

void power_forward(int dtype, int wdtype, int64_t rows, int64_t channels, int64_t group, double eps, bool exact,
                  Memory x, Memory out, Memory weight, Memory kept, Memory bias, Memory running, Memory before,
                  Memory steps, int64_t warmup, double alpha_fwd) {
  Power p = power_of(dtype, wdtype, rows, channels, group, eps, exact, x, out, weight, kept);
  p.bias = bias.at, p.running = running.at, p.before = before.at;
  p.steps = at<int64_t>(steps), p.warmup = warmup, p.alpha_fwd = alpha_fwd;
  run(rows * channels, [&] {
    return chosen.pieces->power_forward(p);
  });
}

void power_backward(int dtype, int wdtype, int64_t rows, int64_t channels, int64_t group, double eps, bool exact,
                   Memory x, Memory out, Memory weight, Memory kept, Memory dy, Memory state, double rate,
                   bool batch, Memory dweight, Memory dbias) {
  Power p = power_of(dtype, wdtype, rows, channels, group, eps, exact, x, out, weight, kept);
  p.dy = dy.at, p.state = state.at, p.rate = rate, p.batch = batch;
  p.dweight = dweight.at, p.dbias = dbias.at;
  run(rows * channels, [&] {
    return chosen.pieces->power_backward(p);
  });
}

Online online_of(int dtype, int wdtype, int64_t steps, int64_t channels, int64_t group, double alpha_fwd,
                 double alpha_bkw, double eps, double guard_eps, double limit, Memory x, Memory out, Memory weight,
                 Memory bias, Memory kept) {
  Online p{};
  p.dtype = dtype, p.wdtype = wdtype;
  p.steps = steps, p.channels = channels, p.group = group;
  p.alpha_fwd = alpha_fwd, p.alpha_bkw = alpha_bkw, p.eps = eps, p.guard_eps = guard_eps, p.limit = limit;
  p.x = x.at, p.out = out.at, p.weight = weight.at, p.bias = bias.at;
  p.kept = at<double>(kept);
  expect_large(out, bytes_of(dtype, steps * channels));
  return p;
}

void online_forward(int dtype, int wdtype, int64_t steps, int64_t channels, int64_t group, double alpha_fwd,
                   double alpha_bkw, double eps, double guard_eps, double limit, Memory x, Memory out, Memory weight,
                   Memory bias, Memory kept, Memory mean, Memory var, Memory mean_before,
                   Memory var_before) {
  Online p = online_of(dtype, wdtype, steps, channels, group, alpha_fwd, alpha_bkw, eps, guard_eps, limit, x, out, weight,
                       bias, kept);
  p.mean = mean.at, p.var = var.at;
  p.mean_before = mean_before.at, p.var_before = var_before.at;
  run(steps * channels, [&] {
    return chosen.pieces->online_forward(p);
  });
}

void online_backward(int dtype, int wdtype, int64_t steps, int64_t channels, int64_t group, double alpha_fwd,
                    double alpha_bkw, double eps, double guard_eps, double limit, Memory x, Memory out, Memory weight,
                    Memory bias, Memory kept, Memory dy, Memory u, Memory v, Memory dweight,
                    Memory dbias) {
  Online p = online_of(dtype, wdtype, steps, channels, group, alpha_fwd, alpha_bkw, eps, guard_eps, limit, x, out, weight,
                       bias, kept);
  p.dy = dy.at, p.u = u.at, p.v = v.at;
  p.dweight = dweight.at, p.dbias = dbias.at;
  run(steps * channels, [&] {
    return chosen.pieces->online_backward(p);
  });
}

OnlineNumbers numbers_of(int wdtype, int64_t steps, int64_t channels, int64_t positions, int64_t group, double alpha_fwd,
                         double alpha_bkw, double eps, double guard_eps, Memory m, Memory s, Memory weight,
                         Memory bias, Memory out) {
  OnlineNumbers p{};
  p.wdtype = wdtype, p.steps = steps, p.channels = channels, p.positions = positions, p.group = group;
  p.alpha_fwd = alpha_fwd, p.alpha_bkw = alpha_bkw, p.eps = eps, p.guard_eps = guard_eps;
  p.m = at<double>(m), p.s = at<double>(s), p.weight = weight.at, p.bias = bias.at;
  p.out = at<double>(out);
  return p;
}

void online_numbers(int wdtype, int64_t steps, int64_t channels, int64_t positions, int64_t group, double alpha_fwd,
                   double alpha_bkw, double eps, double guard_eps, Memory m, Memory s, Memory weight,
                   Memory bias, Memory out, Memory kept, Memory mean, Memory var, Memory mean_before,
                   Memory var_before) {
  OnlineNumbers p = numbers_of(wdtype, steps, channels, positions, group, alpha_fwd, alpha_bkw, eps, guard_eps, m, s,
                               weight, bias, out);
  p.kept = at<double>(kept), p.mean = mean.at, p.var = var.at;
  p.mean_before = mean_before.at, p.var_before = var_before.at;
  run(steps * channels, [&] {
    return chosen.pieces->online_numbers(p);
  });
}

void online_control(int wdtype, int64_t steps, int64_t channels, int64_t positions, int64_t group, double alpha_fwd,
                   double alpha_bkw, double eps, double guard_eps, Memory m, Memory s, Memory weight,
                   Memory bias, Memory out, Memory total_g, Memory total_gd, Memory u, Memory v,
                   Memory dweight, Memory dbias) {
  OnlineNumbers p = numbers_of(wdtype, steps, channels, positions, group, alpha_fwd, alpha_bkw, eps, guard_eps, m, s,
                               weight, bias, out);
  p.total_g = at<double>(total_g), p.total_gd = at<double>(total_gd);
  p.u = u.at, p.v = v.at, p.dweight = dweight.at, p.dbias = dbias.at;
  run(steps * channels, [&] {
    return chosen.pieces->online_control(p);
  });
}

}  // namespace

NB_MODULE(_kernels, m) {
  nb::set_leak_warnings(false);  // Layouts are cached by Python until it exits
  m.doc() = "Fused normalization kernels for the CPU.";
  Torch::get(), view_of_torch();  // found here, where no other thread can be looking for them
  nb::class_<Layout>(m, "Layout")
      .def(nb::init<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int, int, int, int, bool, bool, bool, double,
                    double>())
      .def("masked", &Layout::masked)
      .def("forward", &Layout::forward)
      .def("again", &Layout::again)
      .def("backward", &Layout::backward)
      .def_prop_ro("bits_bytes", [](const Layout& l) { return chosen.kernels->bits_bytes(l.p); })
      .def_prop_ro("bits_row", [](const Layout& l) { return chosen.kernels->bits_row(l.p); });
  nb::class_<Ready>(m, "Ready", nb::type_slots(Ready::slots))
      .def(nb::init<const Layout&, nb::tuple, nb::tuple, Object, Object, Object, nb::object, nb::object,
                    nb::tuple>())
      .def("__call__", &Ready::operator())
      .def("backward", &Ready::backward)
      .def("__reduce__", [](nb::handle) { return nb::make_tuple(nb::none().type(), nb::tuple()); });
  m.def("passes", &passes);
  m.def("looks", [] { return view_of_torch() != nullptr; });
  m.def("sums", &sums);
  m.def("products", &products);
  m.def("advance", &advance);
  m.def("combine", &combine);
  m.def("scan", &scan);
  m.def("clip", &clip);
  m.def("power_forward", &power_forward);
  m.def("power_backward", &power_backward);
  m.def("online_forward", &online_forward);
  m.def("online_backward", &online_backward);
  m.def("online_numbers", &online_numbers);
  m.def("online_control", &online_control);
  m.def("isa", [] { return std::string(chosen.name); });
  m.def("threads", &thread_count);
  m.def("pool", [] { return std::string(pool_name()); });
  m.def("set_serial", &set_serial);
  m.def("set_far", [](int64_t bytes) { return far_from.exchange(bytes); });  // gives back what it was
}
