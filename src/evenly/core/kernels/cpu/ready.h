// The shortest way of a call that was seen before: it is compared with what was seen and started, without a line of
// Python in between. What does not compare is left to Python, which knows every case.
#pragma once

#include <vector>

#include "layout.h"

namespace evenly {
namespace {

// What is asked of PyTorch, found once.
struct Torch {
  PyObject *tensor, *parameter;                                      // the types that are taken
  PyObject *empty_like, *grad_enabled, *increment_version;           // functions
  PyObject *dispatch_modes, *transforms, *tracing, *forward_mode;    // who is watching: functions and a module
  PyObject *requires_grad, *is_neg, *level;                          // names
  PyObject *to_save, *saved_tensors, *needs_input_grad, *spec, *ready;

  static const Torch& get() {
    static const Torch found = [] {
      const auto member = [](nb::handle of, const char* name) { return nb::getattr(of, name).release().ptr(); };
      const nb::object torch = nb::module_::import_("torch"), c = torch.attr("_C");
      Torch t{};
      t.tensor = member(torch, "Tensor"), t.parameter = member(torch.attr("nn"), "Parameter");
      t.empty_like = member(torch, "empty_like"), t.grad_enabled = member(torch, "is_grad_enabled");
      t.increment_version = member(torch.attr("autograd").attr("graph"), "increment_version");
      t.dispatch_modes = member(c, "_len_torch_dispatch_stack");
      t.transforms = member(c, "_are_functorch_transforms_active");
      t.tracing = member(c, "_get_tracing_state");
      t.forward_mode = nb::module_::import_("torch.autograd.forward_ad").release().ptr();
      t.requires_grad = interned("requires_grad"), t.is_neg = interned("is_neg"), t.level = interned("_current_level");
      t.to_save = interned("to_save"), t.saved_tensors = interned("saved_tensors");
      t.needs_input_grad = interned("needs_input_grad"), t.spec = interned("spec"), t.ready = interned("ready");
      return t;
    }();
    return found;
  }

  // Of no subclass, and no view with its sign turned.
  bool plain(nb::handle t) const {
    const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(t.ptr()));
    return (type == tensor || type == parameter) && answer(PyObject_CallMethodNoArgs(t.ptr(), is_neg)) == Py_False;
  }
  bool wants_grad(nb::handle t) const {
    return !t.is_none() && answer(PyObject_GetAttr(t.ptr(), requires_grad)) == Py_True;
  }
  bool keeps_grad() const { return answer(PyObject_CallNoArgs(grad_enabled)) == Py_True; }
  // No dispatch mode, no transform, no tracing, no forward-mode derivative.
  bool ordinary() const {
    const auto whole = [](PyObject* number) { return nb::cast<int64_t>(nb::steal(checked(number))); };
    return whole(PyObject_CallNoArgs(dispatch_modes)) == 0 && answer(PyObject_CallNoArgs(transforms)) == Py_False &&
           whole(PyObject_GetAttr(forward_mode, level)) < 0 && answer(PyObject_CallNoArgs(tracing)) == Py_None;
  }

 private:
  // True, False and None live for ever; of another answer it only matters that it is none of these.
  static PyObject* answer(PyObject* object) {
    Py_DECREF(checked(object));
    return object;
  }
};

inline nb::object attribute(nb::handle of, PyObject* name) { return nb::steal(checked(PyObject_GetAttr(of.ptr(), name))); }
inline void set_attribute(nb::handle of, PyObject* name, nb::handle value) {
  if (PyObject_SetAttr(of.ptr(), name, value.ptr()) != 0) nb::raise_python_error();
}

class Ready {
 public:
  // function: what autograd applies to x, weight, bias, residual and a spec. repeated: the same without a residual,
  // whose `forward` is record(); in the place of the residual it takes this object.
  Ready(const Layout& layout, nb::tuple shape, nb::tuple order, Object weight_shape, Object stat_shape,
        Object stats_like, nb::object function, nb::object repeated, nb::tuple spec)
      : layout_(layout),
        shape_(numbers(shape)),
        order_(numbers(order)),
        has_weight_(!weight_shape.is_none()),
        has_stats_(!stat_shape.is_none()),
        weight_shape_(has_weight_ ? numbers(weight_shape) : Numbers{}),
        stat_shape_(has_stats_ ? numbers(stat_shape) : Numbers{}),
        stats_like_(nb::borrow(stats_like)),
        function_(std::move(function)),
        repeated_(std::move(repeated)),
        spec_(std::move(spec)) {}

  // The output; None if the call is not like the one that was seen. `mean` and `var` are used if statistics are given;
  // with a momentum they are running ones, which move, and `tracked` counts.
  nb::object operator()(Object x, Object weight, Object bias, Object residual, Object mean, Object var, Object momentum,
                        Object tracked) const {
    const Torch& torch = Torch::get();
    const bool moves = !momentum.is_none();
    Memory at_x, at_weight, at_bias, at_residual, at_mean, at_var;
    int64_t* count = nullptr;
    int sdtype = 0;
    if (!like_x(x, at_x) || !parameter(weight, at_weight) || !parameter(bias, at_bias)) return nb::none();
    if (!residual.is_none() && !like_x(residual, at_residual)) return nb::none();
    if (layout_.p.act == ACT_RELU && layout_.p.relu_bits == residual.is_none()) return nb::none();  // other bits
    if (moves && layout_.p.given) return nb::none();
    if (moves || layout_.p.given) {
      int other = 0;
      if (!statistic(mean, at_mean, sdtype) || !statistic(var, at_var, other) || sdtype != other) return nb::none();
      if (moves && (layout_.p.R0 * layout_.p.R1 < 2 || !counter(tracked, count))) return nb::none();
    }
    if (!torch.ordinary()) return nb::none();
    nb::object y;
    if (torch.keeps_grad() && (torch.wants_grad(x) || torch.wants_grad(weight) || torch.wants_grad(bias) ||
                               torch.wants_grad(residual))) {
      nb::tuple spec = spec_;
      if (moves)
        spec = nb::make_tuple(spec_[0], spec_[1], false, nb::make_tuple(mean, var, momentum), nb::none());
      else if (layout_.p.given)
        spec = nb::make_tuple(spec_[0], nb::make_tuple(mean, var), false, nb::none(), nb::none());
      y = residual.is_none() ? called(repeated_.ptr(), x, weight, bias, nb::find(this), spec)
                             : called(function_.ptr(), x, weight, bias, residual, spec);
    } else {
      y = called(torch.empty_like, x);
      Memory at_y;
      memory_of(y, at_y);
      const Memory none;
      layout_.forward(at_x, at_y, none, at_weight, at_bias, at_residual, none, moves ? none : at_mean,
                      moves ? none : at_var, none, none, moves ? at_mean : none, moves ? at_var : none,
                      moves ? nb::cast<double>(momentum) : 0.0, sdtype);
    }
    if (moves) {
      nb::list changed;
      changed.append(mean), changed.append(var);
      if (count) ++*count, changed.append(tracked);
      called(torch.increment_version, changed);
    }
    return y;
  }

  // The forward pass of `repeated`. A spec is (entry, statistics that are given, no, running statistics, no).
  nb::object record(Object ctx, Object x, Object weight, Object bias, nb::tuple spec) const {
    const Torch& torch = Torch::get();
    Memory at_x, at_weight, at_bias, at_stats, at_y, at_mean, at_var;
    memory_of(x, at_x), memory_of(weight, at_weight), memory_of(bias, at_bias);
    nb::object stats = nb::none();
    if (!stats_like_.is_none()) stats = called(torch.empty_like, stats_like_);
    memory_of(stats, at_stats);
    set_attribute(ctx, torch.to_save, nb::make_tuple(x, weight, bias, stats));
    set_attribute(ctx, torch.spec, spec);
    const nb::object y = called(torch.empty_like, x);
    memory_of(y, at_y);
    const bool moves = !spec[3].is_none();
    const nb::object statistics = spec[moves ? 3 : 1];
    int sdtype = 0;
    double momentum = 0;
    if (moves || layout_.p.given) {
      View v;
      look(nb::object(statistics[0]), v);
      at_mean.at = memory_of(v), sdtype = dtype_of(v);
      memory_of(nb::object(statistics[1]), at_var);
      if (moves) momentum = nb::cast<double>(nb::object(statistics[2]));
    }
    const Memory none;
    layout_.forward(at_x, at_y, at_stats, at_weight, at_bias, none, none, moves ? none : at_mean,
                    moves ? none : at_var, none, none, moves ? at_mean : none, moves ? at_var : none, momentum, sdtype);
    return y;
  }

  // The gradients of x, weight and bias as autograd takes them; None if that is to be done in Python. `needs` are five
  // booleans. What was saved is as the forward pass saw it.
  nb::object backward(Object dy, Object x, Object weight, Object bias, Object stats, nb::tuple needs) const {
    const Torch& torch = Torch::get();
    Memory at_dy, at_x, at_weight, at_bias, at_stats, at_dx, at_dweight, at_dbias;
    if (dy.is_none() || !like_x(dy, at_dy) || torch.keeps_grad() || !torch.ordinary()) return nb::none();
    memory_of(x, at_x), memory_of(weight, at_weight), memory_of(bias, at_bias), memory_of(stats, at_stats);
    const auto made = [&](int number, nb::handle like, Memory& at) {
      if (like.is_none() || needs[number].ptr() != Py_True) return nb::object(nb::none());
      nb::object gradient = called(torch.empty_like, like);
      memory_of(gradient, at);
      return gradient;
    };
    const nb::object dx = made(0, x, at_dx), dweight = made(1, weight, at_dweight), dbias = made(2, bias, at_dbias);
    const Memory none;
    layout_.backward(at_dy, at_x, at_stats, at_weight, at_bias, none, none, at_dx, at_dweight, at_dbias, none, none,
                     none);
    return nb::make_tuple(dx, dweight, dbias, nb::none(), nb::none());
  }

  // The collector of cycles has to see what is held: the entry that `spec` names holds this object.
  static int traverse(PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    if (!nb::inst_ready(self)) return 0;
    const Ready* ready = nb::inst_ptr<Ready>(self);
    Py_VISIT(ready->stats_like_.ptr());
    Py_VISIT(ready->function_.ptr());
    Py_VISIT(ready->repeated_.ptr());
    Py_VISIT(ready->spec_.ptr());
    return 0;
  }
  static int clear(PyObject* self) {
    Ready* ready = nb::inst_ptr<Ready>(self);
    ready->stats_like_.reset(), ready->function_.reset(), ready->repeated_.reset(), ready->spec_.reset();
    return 0;
  }
  static PyType_Slot slots[];

 private:
  using Numbers = std::vector<int64_t>;

  static Numbers numbers(nb::handle sequence) {
    Numbers found;
    for (nb::handle number : sequence) found.push_back(nb::cast<int64_t>(number));
    return found;
  }

  static bool same(const View& v, const Numbers& shape) {
    if (v.ndim != static_cast<int32_t>(shape.size())) return false;
    for (int32_t axis = 0; axis < v.ndim; ++axis)
      if (v.shape[axis] != shape[axis]) return false;
    return true;
  }
  static bool contiguous(const View& v) {
    int64_t stride = 1;
    for (int32_t axis = v.ndim - 1; axis >= 0; stride *= v.shape[axis--])
      if (v.shape[axis] != 1 && v.strides[axis] != stride) return false;
    return true;
  }

  // On the CPU, of the shape and dtype of x, and laid out in memory as it was.
  bool like_x(nb::handle t, Memory& memory) const {
    View v;
    if (!Torch::get().plain(t) || !look(t, v) || !on_cpu(v) || dtype_of(v) != layout_.p.dtype || !same(v, shape_))
      return false;
    int64_t stride = 1;
    for (auto axis = order_.rbegin(); axis != order_.rend(); stride *= shape_[*axis++])
      if (shape_[*axis] != 1 && v.strides[*axis] != stride) return false;
    memory.at = memory_of(v);
    return true;
  }
  bool parameter(nb::handle t, Memory& memory) const {
    if (t.is_none()) return true;
    View v;
    if (!has_weight_ || !Torch::get().plain(t) || !look(t, v) || !on_cpu(v) || dtype_of(v) != layout_.p.wdtype ||
        !same(v, weight_shape_) || !contiguous(v))
      return false;
    memory.at = memory_of(v);
    return true;
  }
  bool statistic(nb::handle t, Memory& memory, int& dtype) const {
    View v;
    if (!has_stats_ || !Torch::get().plain(t) || !look(t, v) || !on_cpu(v) || !same(v, stat_shape_) || !contiguous(v) ||
        Torch::get().wants_grad(t))
      return false;
    memory.at = memory_of(v), dtype = dtype_of(v);
    return dtype >= 0;
  }
  static bool counter(nb::handle t, int64_t*& at) {
    if (t.is_none()) return true;
    View v;
    if (!Torch::get().plain(t) || !look(t, v) || !on_cpu(v) || v.ndim != 0 || v.dtype.code != 0 || v.dtype.bits != 64)
      return false;
    at = static_cast<int64_t*>(memory_of(v));
    return true;
  }

  Layout layout_;
  Numbers shape_, order_;
  bool has_weight_, has_stats_;
  Numbers weight_shape_, stat_shape_;
  nb::object stats_like_, function_, repeated_;
  nb::tuple spec_;
};

// What an autograd function is made of whose passes are those of a Ready: its `forward`, and the `apply` of the node of
// its backward pass. backward: the same in Python, for what is not plain. told: called after a forward pass.
inline nb::tuple passes(nb::object backward, nb::object told) {
  nb::object forward = nb::cpp_function(
      [told](Object ctx, Object x, Object weight, Object bias, const Ready& ready, nb::tuple spec) {
        const nb::object y = ready.record(ctx, x, weight, bias, spec);
        called(told.ptr(), ctx, y);
        return y;
      });
  nb::object apply = nb::cpp_function([backward](nb::handle ctx, Object dy) {
    const Torch& torch = Torch::get();
    const nb::tuple saved = nb::cast<nb::tuple>(attribute(ctx, torch.saved_tensors));
    const nb::object entry = nb::cast<nb::tuple>(attribute(ctx, torch.spec))[0];
    const nb::object ready = attribute(entry, torch.ready);
    const auto at = [&](int i) { return Object{nb::handle(PyTuple_GET_ITEM(saved.ptr(), i))}; };
    nb::object found = nb::cast<const Ready&>(ready).backward(dy, at(0), at(1), at(2), at(3),
                                                             nb::cast<nb::tuple>(attribute(ctx, torch.needs_input_grad)));
    return found.is_none() ? called(backward.ptr(), ctx, dy) : found;
  });
  return nb::make_tuple(forward, nb::steal(checked(PyInstanceMethod_New(apply.ptr()))));
}

PyType_Slot Ready::slots[] = {{Py_tp_traverse, reinterpret_cast<void*>(&Ready::traverse)},
                              {Py_tp_clear, reinterpret_cast<void*>(&Ready::clear)},
                              {0, nullptr}};

}  // namespace
}  // namespace evenly
