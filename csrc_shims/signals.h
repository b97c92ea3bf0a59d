// Python's signals in a long call. Python runs their handlers only when asked, on its main thread; what a handler raises,
// as Ctrl-C's does, ends the call. The library does without Python: its functions, all of them of the stable ABI, are
// looked up in the process, and where there are none no signal is awaited.
#pragma once

#include <dlfcn.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <memory>
#include <stdexcept>
#include <utility>

// The type of exception that sets Python's own: PyTorch's bindings (pybind11) call set_error() where they catch one. It
// is recognised by its name, so it is declared here as it is there.
namespace pybind11 {
class __attribute__((visibility("default"))) builtin_exception : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
  virtual void set_error() const = 0;
};
}  // namespace pybind11

namespace torch_paged {

struct Python {
  int (*is_initialized)() = find<int()>("Py_IsInitialized");
  int (*lock)() = find<int()>("PyGILState_Ensure");
  void (*unlock)(int) = find<void(int)>("PyGILState_Release");
  int (*run_handlers)() = find<int()>("PyErr_CheckSignals");
  void (*fetch)(void**, void**, void**) = find<void(void**, void**, void**)>("PyErr_Fetch");
  void (*restore)(void*, void*, void*) = find<void(void*, void*, void*)>("PyErr_Restore");

  bool here() const {
    return is_initialized && lock && unlock && run_handlers && fetch && restore && is_initialized();
  }
  static const Python& get() {
    static const Python python;
    return python;
  }

 private:
  template <class Function>
  static Function* find(const char* name) {
    return reinterpret_cast<Function*>(dlsym(RTLD_DEFAULT, name));
  }
};

// What a signal handler raised.
class SignalRaised final : public pybind11::builtin_exception {
 public:
  SignalRaised() : builtin_exception("torch_paged: a signal handler raised an exception"), error_(new Error) {
    Python::get().fetch(&error_->type, &error_->value, &error_->traceback);
  }
  // Called with Python locked, and once.
  void set_error() const override {
    Python::get().restore(std::exchange(error_->type, nullptr), std::exchange(error_->value, nullptr),
                          std::exchange(error_->traceback, nullptr));
  }

 private:
  struct Error {
    void *type = nullptr, *value = nullptr, *traceback = nullptr;
  };
  std::shared_ptr<Error> error_;
};

// Runs the handlers of signals that have arrived, if this is the main thread, and throws what one of them raises.
inline void raise_signals() {
  if (syscall(SYS_gettid) != getpid()) return;
  const Python& python = Python::get();
  if (!python.here()) return;
  const int state = python.lock();
  std::exception_ptr error;
  if (python.run_handlers() != 0) error = std::make_exception_ptr(SignalRaised());
  python.unlock(state);
  if (error) std::rethrow_exception(error);
}

}  // namespace torch_paged
