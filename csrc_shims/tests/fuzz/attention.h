// One attention call drawn from an input, and what its result must be. In memory that no query may see lie NaN; so do
// padded lanes, gaps between rows, and results before the call. Table entries that are not used hold anything.
//
// The tolerance is a bound, not an estimate: of a weighted mean of values whose weights and result are rounded to the
// call's type, after logits with the rounding errors of float32.
#pragma once

#include "input.h"

namespace torch_paged::fuzz {

struct AttentionProblem {
  bool varlen, with_stats, latent = false;
  bool has_cache = true, has_new = false;
  bool known = true;  // every option is moderate: the result is compared with the reference
  int64_t num_seqs, num_heads, num_kv_heads, head_dim, stored_dim, value_dim, new_value_dim;
  int64_t block_size = 1, num_blocks = 0, table_width = 0, num_tokens = 0, num_new = 0, columns = 0;
  DType dtype, cache_dtype;
  int scales_rank = 0;
  std::vector<int64_t> query_lens, context_lens, new_lens;
  HostTensor query, key, value, cu_q, cu_k, cache, tables, lens, scales, sinks, slopes, mask, positions;
  std::optional<double> softmax_scale;
  double cap = 0;
  bool causal = false;
  std::optional<int64_t> window, chunk, given_value_dim;
  int64_t max_q = 0, max_k = 0;
  int threads = 1;

  // Multiplications of a call, about: few enough for thousands of calls in a second.
  static constexpr int64_t kMostWork = 150 * 1000, kMostReferenceWork = 15 * 1000;

  AttentionProblem(Input& in, bool varlen) : varlen(varlen) {
    draw_sizes(in);
    draw_lengths(in);
    draw_options(in);
    make_tensors(in);
    if (!in.rude) fill(in);
    corrupt(in);
  }

  std::vector<HostTensor> run(const Input& in, int threads) const {
    const char* op = varlen ? (with_stats ? "flash_attn_varlen.with_stats" : "flash_attn_varlen")
                            : (with_stats ? "paged_attention.with_stats" : "paged_attention");
    Call call;
    call.tensor(query);
    if (varlen) {
      for (const HostTensor* t : {&key, &value}) call.optional_tensor(*t);
      call.tensor(cu_q);
      for (const HostTensor* t : {&cu_k, &cache, &tables, &lens}) call.optional_tensor(*t);
      call.integer(max_q);
      call.integer(max_k);
    } else {
      for (const HostTensor* t : {&cache, &tables, &lens}) call.tensor(*t);
    }
    for (const HostTensor* t : {&scales, &sinks, &slopes, &mask}) call.optional_tensor(*t);
    if (varlen) call.optional_tensor(positions);
    call.optional_real(softmax_scale);
    call.real(cap);
    if (varlen) call.boolean(causal);
    call.optional_integer(window);
    call.optional_integer(chunk);
    call.optional_integer(given_value_dim);
    return results_of(call, in, op, with_stats ? 3 : 1, threads);
  }

  // Whether the results are those of the reference, as far as it knows them; ends the process if not.
  void check(const std::vector<HostTensor>& results) const;

 private:
  std::vector<uint8_t> used;  // of each table entry: some query sees a key of it, or there is no window and no chunk
  mutable std::vector<double> logits, sum;

  void draw_sizes(Input& in) {
    with_stats = in.flag();
    dtype = in.pick({DType::f32, DType::bf16, DType::f16});
    if (varlen) {
      const int source = static_cast<int>(in.number(0, 2));
      has_cache = source != 1;
      has_new = source != 0;
    }
    cache_dtype = in.pick({dtype, DType::i8, DType::e4m3, DType::e5m2});
    if (!has_cache) cache_dtype = dtype;
    if (is_quantized(cache_dtype)) scales_rank = in.pick({1, 2, 4});
    latent = in.once_in(4);
    num_seqs = in.number(0, 4);
    num_kv_heads = in.number(1, 3);
    num_heads = num_kv_heads * in.pick<int64_t>({1, 2, 3, 4, 5, 8, 9, 17});
    head_dim = in.flag() ? in.pick<int64_t>({16, 32, 64, 80, 96, 128}) : in.number(1, 72);
    stored_dim = head_dim + in.pick<int64_t>({0, 0, 0, 1, 8, 31});
    new_value_dim = in.flag() ? head_dim : in.number(1, head_dim);
    const int64_t widest = has_new && !latent ? new_value_dim : head_dim;
    if (latent || in.once_in(3)) given_value_dim = in.rude ? in.number(-1, widest + 2) : in.number(1, widest);
    value_dim = given_value_dim.value_or(widest);
    block_size = in.flag() ? in.pick<int64_t>({1, 2, 16, 64, 128}) : in.number(1, 40);
    block_size = std::min(block_size, 10000 / (num_kv_heads * stored_dim));
  }

  void draw_lengths(Input& in) {
    const int64_t most = in.once_in(16) ? 12 * kMostWork : kMostWork;
    int64_t left = most / (num_heads * (head_dim + value_dim + 16));  // queries times keys
    for (int64_t b = 0; b < num_seqs; ++b) {
      int64_t rows = 1;
      if (varlen) rows = in.pick<int64_t>({1, 0, 2, 3, 5, 9, 17, 33, 70, 130});
      if (varlen) rows = std::min(rows, left);
      const int64_t keys = std::min<int64_t>(left / std::max<int64_t>(rows, 1), 2200);
      const auto length = [&](int64_t most) {
        return std::min(most, in.flag() ? in.number(0, 70) : in.flag() ? in.number(0, 300) : in.number(500, 2200));
      };
      query_lens.push_back(rows);
      context_lens.push_back(has_cache ? length(keys) : 0);
      new_lens.push_back(has_new ? length(keys - context_lens[b]) : 0);
      left -= rows * kv_len(b);
      num_tokens += rows;
      num_new += new_lens[b];
      max_q = std::max(max_q, rows);
      max_k = std::max(max_k, kv_len(b));
      table_width = std::max(table_width, (context_lens[b] + block_size - 1) / block_size);
    }
    columns = max_k + in.pick<int64_t>({0, 0, 1, 7, 64});
    table_width += in.number(0, 2);
    const int64_t affordable = 20000 / (num_kv_heads * block_size * stored_dim);
    num_blocks = std::max<int64_t>(in.number(0, 2), std::min(affordable, num_seqs * table_width));
    if (varlen) {
      num_tokens += in.number(0, 2);
      num_new += in.number(0, 2);
      max_q += in.number(0, 1);
      max_k += in.number(0, 1);
    }
    threads = in.flag() ? 1 : static_cast<int>(in.number(1, 9));
  }

  void draw_options(Input& in) {
    const int scale = in.number(0, 7), soft = in.number(0, 7);
    if (scale >= 4) softmax_scale = in.pick({0.125, 0.5, -0.25, 0.0});
    if (scale == 7) {
      known = false;
      softmax_scale =
          in.rude ? in.any_real() : static_cast<float>(in.anything<int32_t>()) * in.pick({1e-9f, 1.f, 1e28f});
    }
    if (soft >= 4) cap = in.pick({0.5, 2.0, 30.0});
    if (soft == 7) {
      known = false;
      cap = in.rude ? in.any_real() : in.pick({1.2e-38, 1e-30, 3.4e38});
    }
    causal = in.flag();
    window = in.width(100);
    chunk = in.width(100);
  }

  void make_tensors(Input& in) {
    const int32_t type = static_cast<int32_t>(dtype), planes = latent ? 1 : 2;
    query = in.tensor(type, {num_tokens, num_heads, head_dim}, true, true);
    if (varlen) cu_q = in.tensor(kI32, {num_seqs + 1}, true);
    if (has_new) {
      key = in.tensor(type, {num_new, num_kv_heads, head_dim}, true);
      if (!latent) value = in.tensor(type, {num_new, num_kv_heads, new_value_dim}, true);
      cu_k = in.tensor(kI32, {num_seqs + 1}, true);
    }
    if (has_cache) {
      cache = in.tensor(static_cast<int32_t>(cache_dtype), {planes, num_blocks, num_kv_heads, block_size, stored_dim});
      tables = in.tensor(kI32, {num_seqs, table_width}, true);
      lens = in.tensor(kI32, {num_seqs}, true);
      if (scales_rank == 1) scales = in.tensor(kF32, {planes}, true);
      if (scales_rank == 2) scales = in.tensor(kF32, {planes, num_kv_heads}, true);
      if (scales_rank == 4) scales = in.tensor(kF32, {planes, num_blocks, num_kv_heads, block_size}, true);
    }
    if (in.once_in(3)) sinks = in.tensor(kF32, {num_heads}, true);
    if (in.once_in(3)) slopes = in.tensor(kF32, {num_heads}, true);
    if (in.once_in(3)) {
      const int64_t rows = varlen ? num_tokens : num_seqs;
      const int heads = in.number(0, 2);
      mask = heads == 0 ? in.tensor(kBool, {rows, columns}, true, true)
                        : in.tensor(kBool, {heads == 1 ? num_kv_heads : num_heads, rows, columns}, true, true);
      if (mask.memory) std::memset(mask.data(), 0, mask.reached_bytes());
    }
    if (varlen && in.once_in(3)) positions = in.tensor(kI32, {num_tokens}, true);
    if (in.rude) {
      max_q = in.number(-1, 200);
      max_k = in.number(-1, 200);
      for (HostTensor* t : {&key, &value, &cu_k, &cache, &tables, &lens, &scales})
        if (varlen && in.once_in(24)) *t = HostTensor();
    }
  }

  int64_t kv_len(int64_t b) const { return context_lens[b] + new_lens[b]; }
  int64_t first_token(int64_t b) const { return varlen ? cu_q.item<int32_t>(b) : b; }
  int64_t position(int64_t b, int64_t i) const {
    if (positions.defined()) return positions.item<int32_t>(first_token(b) + i);
    return kv_len(b) - query_lens[b] + i;
  }
  bool visible(int64_t p, int64_t j) const {
    if ((causal || !varlen || chunk) && j > p) return false;
    if (window && (j > p ? j - p : p - j) >= *window) return false;
    return !chunk || (p >= 0 && j / *chunk == p / *chunk);
  }
  bool masked(int64_t token, int64_t h, int64_t j) const {
    if (!mask.defined()) return false;
    if (mask.rank == 2) return !mask.item<bool>(token, j);
    return !mask.item<bool>(mask.sizes[0] == num_heads ? h : h / group(), token, j);
  }
  int64_t group() const { return num_heads / num_kv_heads; }

  // Where key j of a sequence lies: its row, and its scale.
  struct Place {
    const HostTensor* rows;
    int64_t at, step;
    double scale;
  };
  Place place(int64_t plane, int64_t b, int64_t j, int64_t head) const {
    if (j >= context_lens[b]) {
      const HostTensor& rows = plane == 0 || latent ? key : value;
      return {&rows, rows.at(cu_k.item<int32_t>(b) + j - context_lens[b], head), rows.strides[2], 1};
    }
    const int64_t block = tables.item<int32_t>(b, j / block_size), offset = j % block_size;
    if (latent) plane = 0;
    double scale = 1;
    if (scales_rank == 1) scale = scales.item<float>(plane);
    if (scales_rank == 2) scale = scales.item<float>(plane, head);
    if (scales_rank == 4) scale = scales.item<float>(plane, block, head, offset);
    return {&cache, cache.at(plane, block, head, offset), 1, scale};
  }

  void fill(Input& in) {
    const auto lengths_to = [&](const HostTensor& cu, const std::vector<int64_t>& lengths) {
      cu.item<int32_t>(0) = 0;
      for (int64_t b = 0; b < num_seqs; ++b)
        cu.item<int32_t>(b + 1) = cu.item<int32_t>(b) + static_cast<int32_t>(lengths[b]);
    };
    if (varlen) lengths_to(cu_q, query_lens);
    if (has_new) lengths_to(cu_k, new_lens);
    for (int64_t i = 0; positions.defined() && i < num_tokens; ++i)
      positions.item<int32_t>(i) = static_cast<int32_t>(in.random_below(max_k + 12) - 5);
    const int64_t rows = varlen ? num_tokens : num_seqs, mask_heads = mask.rank == 3 ? mask.sizes[0] : 1;
    const int dense = in.number(1, 7);
    for (int64_t h = 0; mask.defined() && h < mask_heads; ++h)
      for (int64_t t = 0; t < rows; ++t)
        for (int64_t j = 0; j < columns; ++j) {
          bool& open = mask.rank == 3 ? mask.item<bool>(h, t, j) : mask.item<bool>(t, j);
          open = static_cast<int>(in.random() >> 60) < 2 * dense;
        }
    for (int64_t h = 0; h < num_heads; ++h) {
      if (sinks.defined()) sinks.item<float>(h) = static_cast<float>(in.random_below(64) - 32) / 8;
      if (slopes.defined()) slopes.item<float>(h) = static_cast<float>(in.random_below(16) - 4) / 16;
    }
    fill_scales(in);
    fill_rows_of_sequences(in);
  }

  void fill_scales(Input& in) {
    const auto some = [&] {
      return static_cast<float>(in.random_below(15) + 1) / (cache_dtype == DType::i8 ? 512 : 16);
    };
    for (int64_t plane = 0; scales.defined() && plane < scales.sizes[0]; ++plane) {
      if (scales_rank == 1) scales.item<float>(plane) = some();
      for (int64_t h = 0; scales_rank == 2 && h < num_kv_heads; ++h) scales.item<float>(plane, h) = some();
    }
  }

  // Only what some query may see becomes a number.
  void fill_rows_of_sequences(Input& in) {
    used.assign(num_seqs * table_width, 0);
    const bool poison_some = in.once_in(8);
    std::vector<uint8_t> seen;
    for (int64_t b = 0; b < num_seqs; ++b) {
      seen.assign(kv_len(b), 0);
      for (int64_t i = 0; i < query_lens[b]; ++i) {
        const int64_t token = first_token(b) + i, p = position(b, i);
        in.fill_tokens(query, token, 1);
        for (int64_t j = 0; j < kv_len(b); ++j) {
          const bool sees = visible(p, j);
          if (j < context_lens[b] && (sees || (!window && !chunk))) used[b * table_width + j / block_size] = 1;
          if (!sees) continue;
          bool open = !mask.defined();
          for (int64_t h = 0; !open && h < num_heads; ++h) open = !masked(token, h, j);
          seen[j] |= open;
        }
      }
      if (has_cache) {
        lens.item<int32_t>(b) = static_cast<int32_t>(context_lens[b]);
        for (int64_t m = 0; m < table_width; ++m) {
          const bool kept = used[b * table_width + m] && num_blocks > 0;
          tables.item<int32_t>(b, m) =
              kept ? static_cast<int32_t>(in.random_below(num_blocks)) : static_cast<int32_t>(in.random());
        }
      }
      for (int64_t j = 0; j < kv_len(b); ++j) {
        if (!seen[j] || (poison_some && in.random_below(32) == 0)) continue;
        for (int64_t plane = 0; plane < (latent ? 1 : 2); ++plane)
          for (int64_t h = 0; h < num_kv_heads; ++h) {
            if (scales_rank == 4 && j < context_lens[b]) {
              const int64_t block = tables.item<int32_t>(b, j / block_size);
              scales.item<float>(plane, block, h, j % block_size) =
                  static_cast<float>(in.random_below(15) + 1) / (cache_dtype == DType::i8 ? 512 : 16);
            }
            const Place to = place(plane, b, j, h);
            const int64_t width = plane == 0 ? head_dim : to.rows == &cache ? value_dim : new_value_dim;
            in.fill_lanes(*to.rows, to.at, width);
          }
      }
    }
  }

  void corrupt(Input& in) {
    for (const HostTensor* t : {&cu_q, &cu_k, &tables, &lens, &positions})
      if (t->defined()) in.corrupt<int32_t>(*t);
    for (const HostTensor* t : {&scales, &sinks, &slopes})
      if (t->defined()) in.corrupt<float>(*t);
    known = known && !in.rude && !in.corrupting;
  }

  // One row of the result in double.
  struct Row {
    double lse, top;
    double mass = 0;   // the weighted mean of the values' magnitudes
    double error = 0;  // of the logits, at most
  };
  Row reference(int64_t b, int64_t i, int64_t h) const;
};

inline AttentionProblem::Row AttentionProblem::reference(int64_t b, int64_t i, int64_t h) const {
  const int64_t token = first_token(b) + i, p = position(b, i), head = h / group();
  const double scale = static_cast<float>(softmax_scale.value_or(1 / std::sqrt(static_cast<double>(head_dim))));
  Row row;
  row.top = -kInfinity;
  logits.assign(kv_len(b), -kInfinity);
  for (int64_t j = 0; j < kv_len(b); ++j) {
    if (!visible(p, j) || masked(token, h, j)) continue;
    const Place key = place(0, b, j, head);
    double x = 0, magnitude = 0;
    for (int64_t d = 0; d < head_dim; ++d) {
      const double term = number_at(dtype, query.data(), query.at(token, h, d)) *
                          number_at(static_cast<DType>(key.rows->type), key.rows->data(), key.at + d * key.step);
      x += term;
      magnitude += std::fabs(term);
    }
    magnitude *= std::fabs(scale * key.scale);
    x *= scale * key.scale;
    if (cap != 0) x = cap * std::tanh(x / cap);
    const double bias = slopes.defined() ? slopes.item<float>(h) * std::fabs(static_cast<double>(p - j)) : 0;
    x -= bias;
    row.error = std::max(row.error, std::ldexp(head_dim + 16.0, -23) * magnitude +
                                        std::ldexp(4 + std::fabs(x) + 2 * std::fabs(bias) + cap, -22));
    logits[j] = x;
    row.top = x > row.top || std::isnan(x) ? x : row.top;
  }
  const double sink = sinks.defined() ? sinks.item<float>(h) : -kInfinity;
  const double peak = std::max(row.top, sink);
  row.lse = peak;
  sum.assign(value_dim, 0);
  if (peak == -kInfinity) return row;
  double total = std::exp(sink - peak);
  for (int64_t j = 0; j < kv_len(b); ++j) {
    if (logits[j] == -kInfinity) continue;
    const double weight = std::exp(logits[j] - peak);
    total += weight;
    const Place value = place(1, b, j, head);
    double largest = 0;
    for (int64_t d = 0; d < value_dim; ++d) {
      const double v =
          value.scale * number_at(static_cast<DType>(value.rows->type), value.rows->data(), value.at + d * value.step);
      sum[d] += weight * v;
      largest = std::max(largest, std::fabs(v));
    }
    row.mass += weight * (value.rows == &cache && cache_dtype == DType::i8 ? 128 * value.scale : largest);
  }
  for (double& x : sum) x /= total;
  row.mass /= total;
  row.lse = peak + std::log(total);
  return row;
}

inline void AttentionProblem::check(const std::vector<HostTensor>& results) const {
  if (results.empty() || !known) return;
  const HostTensor& out = results[0];
  int64_t work = 0;
  for (int64_t b = 0; b < num_seqs; ++b) work += query_lens[b] * num_heads * kv_len(b) * (head_dim + value_dim);
  const bool compared = work <= kMostReferenceWork;
  const auto show = [&](const char* what, int64_t token, int64_t h, double got, double want, double allowed) {
    found(std::string(what) + " of token " + std::to_string(token) + ", head " + std::to_string(h) + ": " +
          std::to_string(got) + " instead of " + std::to_string(want) + ", allowed " + std::to_string(allowed));
  };
  const double unit = std::ldexp(1.0, -format(dtype).mantissa_bits);
  int64_t token = 0;
  for (int64_t b = 0; b < num_seqs; ++b)
    for (int64_t i = 0; i < query_lens[b]; ++i, ++token)
      for (int64_t h = 0; compared && h < num_heads; ++h) {
        const Row row = reference(b, i, h);
        const double allowed =
            (1.1 * unit + 4 * row.error + std::ldexp(static_cast<double>(kv_len(b)) + 16, -22)) * row.mass + 1e-6;
        const bool poisoned = std::isnan(row.top) || std::isnan(row.lse);
        for (int64_t d = 0; d < value_dim && !poisoned; ++d) {
          const double got = number_at(dtype, out.data(), out.at(token, h, d));
          if (std::isnan(sum[d])) continue;
          const bool good = std::isnan(row.mass) ? !std::isnan(got) : std::fabs(got - sum[d]) <= allowed;
          if (!good) show("the result", token, h, got, sum[d], allowed);
        }
        if (!with_stats || poisoned) continue;
        const double lse = results[1].item<float>(token, h), top = results[2].item<float>(token, h);
        for (const auto& [got, want, what] :
             {std::tuple<double, double, const char*>{lse, row.lse, "lse"}, {top, row.top, "max_logits"}}) {
          const double near = 1e-4 + 1e-5 * std::fabs(want) + 2 * row.error;
          if (std::isinf(want) ? got != want : !(std::fabs(got - want) <= near)) show(what, token, h, got, want, near);
        }
      }
  for (; token < num_tokens; ++token)  // rows of no sequence
    for (int64_t h = 0; h < num_heads; ++h) {
      for (int64_t d = 0; d < value_dim; ++d)
        if (number_at(dtype, out.data(), out.at(token, h, d)) != 0) show("padding", token, h, 1, 0, 0);
      for (size_t n = 1; n < results.size(); ++n)
        if (results[n].item<float>(token, h) != -kInfinity) show("statistics of padding", token, h, 0, -kInfinity, 0);
    }
}

// The results are right, and the same bits however many threads share the work.
inline void run_attention(Input& in, bool varlen) {
  const AttentionProblem problem(in, varlen);
  const std::vector<HostTensor> results = problem.run(in, 1);
  problem.check(results);
  if (problem.threads == 1) return;
  const std::vector<HostTensor> again = problem.run(in, problem.threads);
  if (results.size() != again.size()) found("accepted once");
  for (size_t i = 0; i < results.size(); ++i)
    if (results[i].contents() != again[i].contents()) found("other bits with more threads");
}

}  // namespace torch_paged::fuzz
