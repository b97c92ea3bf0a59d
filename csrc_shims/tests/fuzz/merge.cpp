// merge_attention_states against the same sums in double. Parts that weigh nothing hold NaN.
#include "input.h"

using namespace torch_paged;
using namespace torch_paged::fuzz;

namespace {

struct Merge {
  DType dtype;
  int64_t num_parts, num_tokens, num_heads, head_dim;
  HostTensor outs, lses, sinks;
  bool known = true;

  explicit Merge(Input& in) {
    dtype = in.pick({DType::f32, DType::bf16, DType::f16});
    num_parts = in.number(1, 5);
    num_tokens = in.flag() ? in.number(0, 3) : in.number(0, 70);
    num_heads = in.number(1, 5);
    head_dim = in.flag() ? in.number(1, 20) : in.number(1, 300);
    if (num_tokens > 3) head_dim = std::min<int64_t>(head_dim, 40);
    outs = in.tensor(static_cast<int32_t>(dtype), {num_parts, num_tokens, num_heads, head_dim}, true);
    lses = in.tensor(kF32, {num_parts, num_tokens, num_heads}, true);
    if (in.flag()) sinks = in.tensor(kF32, {num_heads}, true);
    if (in.rude) return;
    for (int64_t h = 0; sinks.defined() && h < num_heads; ++h)
      sinks.item<float>(h) = in.random_below(8) == 0 ? -kInfinity : static_cast<float>(in.random_below(64) - 32) / 4;
    const int empty = in.number(0, 8);
    for (int64_t p = 0; p < num_parts; ++p)
      for (int64_t t = 0; t < num_tokens; ++t)
        for (int64_t h = 0; h < num_heads; ++h) {
          float& lse = lses.item<float>(p, t, h);
          lse = -static_cast<float>(kInfinity);
          if (in.random_below(8) < empty) continue;
          lse = static_cast<float>(in.random_below(256) - 128) / 8;
          in.fill_lanes(outs, outs.at(p, t, h), head_dim);
        }
    if (!in.corrupting || lses.numel() == 0) return;
    known = false;  // infinities, NaN and numbers of every size
    const int32_t bits = in.anything<int32_t>();
    std::memcpy(
        &lses.item<float>(in.number(0, num_parts - 1), in.number(0, num_tokens - 1), in.number(0, num_heads - 1)),
        &bits, 4);
  }

  void check_row(const HostTensor& out, const HostTensor& lse, int64_t t, int64_t h) const {
    double peak = sinks.defined() ? sinks.item<float>(h) : -kInfinity;
    for (int64_t p = 0; p < num_parts; ++p) peak = std::max<double>(peak, lses.item<float>(p, t, h));
    const double base = peak == -kInfinity ? 0 : peak;
    double total = sinks.defined() ? std::exp(sinks.item<float>(h) - base) : 0;
    for (int64_t p = 0; p < num_parts; ++p) total += std::exp(lses.item<float>(p, t, h) - base);
    const double want_lse = base + std::log(total), got_lse = lse.item<float>(t, h);
    if (std::isinf(want_lse) ? got_lse != want_lse : !(std::fabs(got_lse - want_lse) <= 1e-4)) found("the merged lse");
    for (int64_t d = 0; d < head_dim; ++d) {
      double sum = 0, mass = 0;
      for (int64_t p = 0; p < num_parts; ++p) {
        const double weight = std::exp(lses.item<float>(p, t, h) - base);
        if (weight == 0) continue;
        const double term = weight * number_at(dtype, outs.data(), outs.at(p, t, h, d));
        sum += term;
        mass += std::fabs(term);
      }
      const double got = number_at(dtype, out.data(), out.at(t, h, d)), scale = total == 0 ? 0 : 1 / total;
      const double unit = std::ldexp(1.0, -format(dtype).mantissa_bits);
      if (!(std::fabs(got - sum * scale) <= (0.6 * unit + std::ldexp(1.0, -18)) * mass * scale + 1e-6))
        found("a merged element");
    }
  }

  void run(Input& in) const {
    Call call;
    call.tensor(outs);
    call.tensor(lses);
    call.optional_tensor(sinks);
    const std::vector<HostTensor> results = results_of(call, in, "merge_attention_states", 2);
    if (results.empty() || in.rude || !known) return;
    for (int64_t t = 0; t < num_tokens; ++t)
      for (int64_t h = 0; h < num_heads; ++h) check_row(results[0], results[1], t, h);
  }
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  return one_execution(data, size, [](Input& in) { Merge(in).run(in); });
}
