// What every kernel needs: integers, tasks and memory.

EVENLY_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
EVENLY_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
EVENLY_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class F>
void parallel(int64_t n, const F& f, bool backwards = false) {
  run_tasks(n, [](void* context, int64_t i) { (*static_cast<const F*>(context))(i); },
            const_cast<void*>(static_cast<const void*>(&f)), backwards);
}

// A buffer that frees itself.
template <class S>
struct Buffer {
  S* data = nullptr;
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data); }
  bool allocate(int64_t n) {
    data = static_cast<S*>(std::malloc(static_cast<size_t>(n > 0 ? n : 1) * sizeof(S)));
    return data != nullptr;
  }
  bool zeros(int64_t n) {
    data = static_cast<S*>(std::calloc(static_cast<size_t>(n > 0 ? n : 1), sizeof(S)));
    return data != nullptr;
  }
};
