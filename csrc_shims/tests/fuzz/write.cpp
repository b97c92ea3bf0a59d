// reshape_and_cache and quantize_and_cache: every byte of the cache and of its scales after the call, those between and
// beyond the written rows included.
#include "caches.h"

using namespace torch_paged;
using namespace torch_paged::fuzz;

namespace {

// Round to nearest even in a type of one byte; `q` is a number.
uint8_t quantized(float q, DType dtype) {
  const double x = std::clamp(static_cast<double>(q), -1.0 * largest(dtype), 1.0 * largest(dtype));
  if (dtype == DType::i8) return static_cast<uint8_t>(static_cast<int8_t>(std::nearbyint(x)));
  const Format f = format(dtype);
  const uint8_t sign = std::signbit(x) ? 0x80 : 0;
  if (x == 0) return sign;
  int exponent;
  std::frexp(x, &exponent);
  exponent = std::max(exponent - 1, 1 - f.bias);
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(std::fabs(x), f.mantissa_bits - exponent)));
  const int one = 1 << f.mantissa_bits;
  return sign | (steps < one ? steps : ((exponent + f.bias) << f.mantissa_bits) + steps - one);
}

struct Write {
  CacheProblem cache;
  bool computes_scales;
  DType dtype;
  int64_t num_tokens, head_dim, value_dim;
  HostTensor key, value, slots;

  Write(Input& in, bool computes_scales)
      : cache(
            computes_scales
                ? CacheProblem(in, {DType::i8, DType::e4m3, DType::e5m2}, {4})
                : CacheProblem(in, {DType::f32, DType::bf16, DType::f16, DType::i8, DType::e4m3, DType::e5m2}, {1, 2})),
        computes_scales(computes_scales) {
    dtype = is_quantized(cache.dtype) ? in.pick({DType::f32, DType::bf16, DType::f16}) : cache.dtype;
    head_dim = cache.stored_dim - (in.flag() ? 0 : in.number(0, cache.stored_dim - 1));
    value_dim = head_dim - (in.flag() ? 0 : in.number(0, head_dim - 1));
    num_tokens = in.flag() ? in.number(0, 4) : in.number(0, 70);
    if (in.once_in(96))
      num_tokens = (1 << 20) / (cache.num_kv_heads * (head_dim + value_dim) * element_size(dtype)) + 1;
    const int32_t type = static_cast<int32_t>(dtype);
    key = in.tensor(type, {num_tokens, cache.num_kv_heads, head_dim}, true, true);
    if (!cache.latent) value = in.tensor(type, {num_tokens, cache.num_kv_heads, value_dim}, true, true);
    slots = in.tensor(in.flag() ? kI64 : kI32, {num_tokens}, true);
    if (in.rude) return;
    const int64_t num_slots = cache.num_blocks * cache.block_size;
    const bool wild = in.once_in(4);  // infinities, NaN and numbers of every size
    for (int64_t t = 0; t < num_tokens; ++t) {
      const int64_t slot = num_slots == 0 || in.random_below(8) == 0 ? -1 : in.random_below(num_slots);
      if (slots.type == kI64)
        slots.item<int64_t>(t) = slot;
      else
        slots.item<int32_t>(t) = static_cast<int32_t>(slot);
      for (HostTensor* rows : {&key, &value}) {
        if (slot < 0 || !rows->defined()) continue;
        in.fill_tokens(*rows, t, 1);
        for (int64_t d = 0; wild && d < rows->sizes[2]; d += 1 + in.random_below(8)) {
          const uint64_t bits = in.random();
          std::memcpy(rows->data() + rows->at(t, in.random_below(cache.num_kv_heads), d) * bytes_of(type), &bits,
                      bytes_of(type));
        }
      }
    }
    if (slots.type == kI64)
      in.corrupt<int64_t>(slots);
    else
      in.corrupt<int32_t>(slots);
    if (cache.scales.defined()) in.corrupt<float>(cache.scales);
  }

  int64_t slot_of(int64_t t) const { return slots.type == kI64 ? slots.item<int64_t>(t) : slots.item<int32_t>(t); }

  // What one row of a token becomes; where several tokens have a slot, or int8 has no NaN, whatever was written.
  void expect_row(const Expected& rows, const Expected& scales, int64_t plane, int64_t token, int64_t head,
                  bool shared) const {
    const int64_t slot = slot_of(token), block = slot / cache.block_size, offset = slot % cache.block_size;
    const int64_t place = cache.cache.at(plane, block, head, offset), bytes = bytes_of(cache.cache.type);
    const int64_t scale_at = cache.scales_rank == 4 ? cache.scales.at(plane, block, head, offset) : 0;
    if (shared) {
      std::memcpy(rows.row(place), cache.cache.data() + place * bytes, cache.stored_dim * bytes);
      if (cache.scales_rank == 4) std::memcpy(scales.row(scale_at), cache.scales.data() + scale_at * 4, 4);
      return;
    }
    const HostTensor& source = plane == 0 ? key : value;
    const int64_t dim = plane == 0 ? head_dim : value_dim;
    const auto element = [&](int64_t d) {
      return static_cast<float>(number_at(dtype, source.data(), source.at(token, head, d)));
    };
    float scale = cache.scales_rank == 4 ? 0 : cache.scale_at(plane, block, head, offset);
    if (computes_scales) {
      for (int64_t d = 0; d < dim; ++d) scale = std::max(scale, std::isnan(element(d)) ? 0 : std::fabs(element(d)));
      scale = std::min(scale, std::numeric_limits<float>::max()) / largest(cache.dtype);
      if (!(scale > 0)) scale = 1;
      std::memcpy(scales.row(scale_at), &scale, 4);
    }
    std::memset(rows.row(place), 0, cache.stored_dim * bytes);
    for (int64_t d = 0; d < dim; ++d) {
      char* to = rows.row(place + d);
      const char* written = cache.cache.data() + (place + d) * bytes;
      if (!is_quantized(cache.dtype)) {
        std::memcpy(to, source.data() + source.at(token, head, d) * bytes, bytes);
      } else if (const float q = element(d) / scale; !std::isnan(q)) {
        *to = static_cast<char>(quantized(q, cache.dtype));
      } else if (cache.dtype != DType::i8 && !std::isnan(number_at(cache.dtype, written, 0))) {
        found("NaN became a number");
      } else {
        *to = *written;
      }
    }
  }

  void run(Input& in) const {
    const char* op = computes_scales ? "quantize_and_cache" : "reshape_and_cache";
    const Expected rows(cache.cache), scales(cache.scales);
    Call call;
    call.tensor(key);
    call.optional_tensor(value);
    call.tensor(cache.cache);
    if (computes_scales) {
      call.tensor(cache.scales);
      call.tensor(slots);
    } else {
      call.tensor(slots);
      call.optional_tensor(cache.scales);
    }
    const bool accepted = was_accepted(call, in, op);
    if (accepted && in.rude) return;
    if (accepted) {
      std::vector<int32_t> writers(cache.num_blocks * cache.block_size);
      for (int64_t t = 0; t < num_tokens; ++t)
        if (slot_of(t) >= 0) ++writers.at(slot_of(t));
      for (int64_t t = 0; t < num_tokens; ++t)
        for (int64_t plane = 0; plane < cache.planes && slot_of(t) >= 0; ++plane)
          for (int64_t h = 0; h < cache.num_kv_heads; ++h)
            expect_row(rows, scales, plane, t, h, writers[slot_of(t)] > 1);
    }
    rows.check(accepted ? "the cache after a write" : "a refused write changed the cache");
    scales.check(accepted ? "the scales after a write" : "a refused write changed the scales");
  }
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  return one_execution(data, size, [](Input& in) { Write(in, in.flag()).run(in); });
}
