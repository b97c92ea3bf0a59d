// What a call has to do with Python: its signals in a long call, and the kinds of its exceptions. The library does
// without Python: the functions, all of them of Python's stable ABI, are looked up in the process, and where there are
// none no signal is awaited and exceptions are those of C++.
#pragma once

#include <dlfcn.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <exception>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

// The type of exception that sets Python's own: PyTorch's bindings (pybind11) call set_error() where they catch one,
// and hand it on where some versions (2.15) make a RuntimeError of every other. It is recognised by its name, so it is
// declared here as it is there.
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
  void (*set)(void*, const char*) = find<void(void*, const char*)>("PyErr_SetString");
  void** value_error = static_cast<void**>(dlsym(RTLD_DEFAULT, "PyExc_ValueError"));
  void** memory_error = static_cast<void**>(dlsym(RTLD_DEFAULT, "PyExc_MemoryError"));

  bool here() const {
    return is_initialized && lock && unlock && run_handlers && fetch && restore && set && value_error && memory_error &&
           is_initialized();
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

// An exception of Python's, by its type.
class Raised final : public pybind11::builtin_exception {
 public:
  Raised(void* type, const std::string& text) : builtin_exception(text), type_(type) {}
  void set_error() const override { Python::get().set(type_, what()); }

 private:
  void* type_;
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

// The same boxed op with Python's exceptions.
template <auto op>
void with_python_errors(StableIValue* values, uint64_t num_inputs, uint64_t num_outputs) {
  try {
    op(values, num_inputs, num_outputs);
  } catch (const std::invalid_argument& error) {
    if (!Python::get().here()) throw;
    throw Raised(*Python::get().value_error, error.what());
  } catch (const std::bad_alloc&) {
    if (!Python::get().here()) throw;
    throw Raised(*Python::get().memory_error, "torch_paged: out of memory");
  }
}

}  // namespace torch_paged
