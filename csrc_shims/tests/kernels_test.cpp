// The kernels on raw pointers against naive loops in double, without torch: for cross-builds under an emulator, and for
// sanitizers. Every slot of the cache that no sequence owns holds NaN (or the largest byte), and so do padded lanes.
//
// The tolerance is the project's rule: twice the error of a plain loop in the same dtype, one ulp of the dtype times
// the largest result, and 1e-6.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "formats.h"

using namespace torch_paged;

namespace {

struct Case {
  std::string name;
  DType dtype = DType::f32, cache_dtype = DType::f32;
  int64_t group = 4, num_kv_heads = 2, head_dim = 64, stored_dim = 64, block_size = 16;
  std::vector<int64_t> context_lens = {1, 17, 0, 100, 700};
  std::vector<int64_t> query_lens;  // empty: decode
  bool causal = true, sinks = false, slopes = false, latent = false;
  int64_t window = 0, chunk = 0, value_dim = 0;
  double cap = 0;
  int scales_rank = 0;
};

struct Buffer {
  DType dtype = DType::f32;
  std::vector<char> bytes;
  void resize(DType type, int64_t n) {
    dtype = type;
    bytes.assign(n * element_size(type), 0);
  }
  void* data() { return bytes.data(); }
  double at(int64_t i) const { return decode(dtype, bytes.data(), i); }
  void set(int64_t i, double x) { encode(dtype, bytes.data(), i, x); }
};

struct Problem {
  Case c;
  int64_t num_seqs, num_tokens, table_width, num_blocks, planes, heads;
  Buffer query, keys, values, cache;
  std::vector<double> decoded, asked;  // of cache and query
  std::vector<float> scales, sinks, slopes;
  std::vector<int32_t> tables, lengths, cu;
  std::vector<int64_t> slots, first_key;  // slot of each key, first key of each sequence
  AttentionArgs args;

  explicit Problem(const Case& given) : c(given) {
    std::mt19937 random(7);
    const auto number = [&] { return (static_cast<int>(random() % 127) - 63) / 32.0; };
    num_seqs = c.context_lens.size();
    planes = c.latent ? 1 : 2;
    heads = c.num_kv_heads * c.group;
    int64_t longest = 0, total = 0;
    for (const int64_t n : c.context_lens) longest = std::max(longest, n);
    table_width = longest / c.block_size + 2;
    num_blocks = num_seqs * table_width + 3;
    std::vector<int32_t> blocks(num_blocks);
    for (int64_t i = 0; i < num_blocks; ++i) blocks[i] = i;
    std::shuffle(blocks.begin(), blocks.end(), random);

    tables.assign(num_seqs * table_width, -1);
    cu = {0};
    size_t next = 0;
    for (int64_t b = 0; b < num_seqs; ++b) {
      lengths.push_back(c.context_lens[b]);
      first_key.push_back(total);
      for (int64_t j = 0; j < c.context_lens[b]; ++j) {
        if (j % c.block_size == 0) tables[b * table_width + j / c.block_size] = blocks[next++];
        slots.push_back(tables[b * table_width + j / c.block_size] * c.block_size + j % c.block_size);
      }
      total += c.context_lens[b];
      cu.push_back(cu.back() + (c.query_lens.empty() ? 1 : c.query_lens[b]));
    }
    num_tokens = cu.back();
    const auto fill = [&](Buffer& buffer, int64_t n) {
      buffer.resize(c.dtype, n);
      for (int64_t i = 0; i < n; ++i) buffer.set(i, number());
    };
    fill(query, num_tokens * heads * c.head_dim);
    fill(keys, total * c.num_kv_heads * c.head_dim);
    fill(values, total * c.num_kv_heads * c.head_dim);
    cache.resize(c.cache_dtype, planes * num_blocks * c.num_kv_heads * c.block_size * c.stored_dim);
    for (int64_t i = 0; i < static_cast<int64_t>(cache.bytes.size()) / element_size(c.cache_dtype); ++i)
      if (c.cache_dtype == DType::i8)
        cache.bytes[i] = 127;
      else
        cache.set(i, std::nan(""));
    for (int64_t h = 0; c.sinks && h < heads; ++h) sinks.push_back(0.25f * h - 1);
    for (int64_t h = 0; c.slopes && h < heads; ++h) slopes.push_back(0.0625f * (h + 1));
    if (c.scales_rank == 1) scales = {0.0625f, 0.125f};
    if (c.scales_rank == 2)
      for (int64_t i = 0; i < planes * c.num_kv_heads; ++i) scales.push_back(0.03125f * (i + 1));
    if (c.scales_rank == 4)
      scales.assign(planes * num_blocks * c.num_kv_heads * c.block_size, std::numeric_limits<float>::quiet_NaN());
    bind();
  }

  void bind() {
    Cache& kv = args.cache;
    kv.data = cache.data();
    kv.dtype = c.cache_dtype;
    kv.latent = c.latent;
    kv.num_blocks = num_blocks, kv.num_kv_heads = c.num_kv_heads;
    kv.block_size = c.block_size, kv.stored_dim = c.stored_dim;
    kv.stride_token = c.stored_dim;
    kv.stride_head = kv.stride_token * c.block_size;
    kv.stride_block = kv.stride_head * c.num_kv_heads;
    kv.stride_kv = kv.stride_block * num_blocks;
    kv.scales = scales.empty() ? nullptr : scales.data();
    kv.scales_rank = c.scales_rank;
    if (c.scales_rank == 1) kv.scale_stride_kv = 1;
    if (c.scales_rank == 2) kv.scale_stride_kv = c.num_kv_heads, kv.scale_stride_head = 1;
    if (c.scales_rank == 4) {
      kv.scale_stride_token = 1;
      kv.scale_stride_head = c.block_size;
      kv.scale_stride_block = kv.scale_stride_head * c.num_kv_heads;
      kv.scale_stride_kv = kv.scale_stride_block * num_blocks;
    }
    args.num_tokens = num_tokens, args.num_seqs = num_seqs;
    args.num_heads = heads, args.num_kv_heads = c.num_kv_heads;
    args.head_dim = c.head_dim, args.value_dim = value_dim();
    args.dtype = c.dtype;
    args.query = {query.data(), heads * c.head_dim, c.head_dim};
    args.has_cache = true;
    args.block_tables = tables.data(), args.table_stride = table_width;
    args.context_lens = lengths.data();
    args.decode = c.query_lens.empty();
    args.cu_seqlens_q = args.decode ? nullptr : cu.data();
    args.sinks = sinks.empty() ? nullptr : sinks.data();
    args.alibi_slopes = slopes.empty() ? nullptr : slopes.data();
    args.softmax_scale = scale();
    args.logits_soft_cap = c.cap;
    args.causal = c.causal;
    args.sliding_window = c.window, args.attention_chunk = c.chunk;
  }

  int64_t value_dim() const { return c.value_dim ? c.value_dim : c.head_dim; }
  float scale() const { return 1 / std::sqrt(static_cast<float>(c.head_dim)); }
  int64_t offset(int64_t plane, int64_t slot, int64_t head) const {
    return ((plane * num_blocks + slot / c.block_size) * c.num_kv_heads + head) * c.block_size + slot % c.block_size;
  }
  double cached(int64_t plane, int64_t slot, int64_t head, int64_t lane) const {
    return decoded[offset(plane, slot, head) * c.stored_dim + lane];
  }

  // Decode what is stored, times its scale.
  void read() {
    decoded.resize(cache.bytes.size() / element_size(c.cache_dtype));
    for (int64_t plane = 0; plane < planes; ++plane)
      for (int64_t slot = 0; slot < num_blocks * c.block_size; ++slot)
        for (int64_t h = 0; h < c.num_kv_heads; ++h) {
          const int64_t row = offset(plane, slot, h);
          double factor = 1;
          if (c.scales_rank == 1) factor = scales[plane];
          if (c.scales_rank == 2) factor = scales[plane * c.num_kv_heads + h];
          if (c.scales_rank == 4) factor = scales[row];
          for (int64_t i = row * c.stored_dim; i < (row + 1) * c.stored_dim; ++i) decoded[i] = factor * cache.at(i);
        }
    asked.resize(num_tokens * heads * c.head_dim);
    for (size_t i = 0; i < asked.size(); ++i) asked[i] = query.at(i);
  }

  void write() {
    CacheWriteArgs w;
    w.num_tokens = slots.size();
    w.head_dim = c.head_dim, w.value_dim = c.latent ? 0 : c.head_dim;
    w.dtype = c.dtype;
    const int64_t row = c.num_kv_heads * c.head_dim;
    w.key = {keys.data(), row, c.head_dim};
    if (!c.latent) w.value = {values.data(), row, c.head_dim};
    w.cache = args.cache;
    w.slots = slots.data();
    w.compute_scales = c.scales_rank == 4;
    write_cache(w);
    // Only read from here on: a stored lane behind the rows' width is never trusted.
    for (const int64_t slot : slots)
      for (int64_t plane = 0; plane < planes; ++plane)
        for (int64_t h = 0; h < c.num_kv_heads; ++h)
          for (int64_t lane = c.head_dim; lane < c.stored_dim; ++lane)
            if (c.cache_dtype != DType::i8) cache.set(offset(plane, slot, h) * c.stored_dim + lane, std::nan(""));
    read();
  }

  bool visible(int64_t j, int64_t p) const {
    if ((c.causal || args.decode || c.chunk) && j > p) return false;
    if (c.window && std::llabs(p - j) >= c.window) return false;
    return !c.chunk || (p >= 0 && j / c.chunk == p / c.chunk);
  }

  // One row of the result; plain: probabilities rounded to the dtype and float sums, as a plain loop would have them.
  void row(int64_t b, int64_t token, int64_t h, bool plain, std::vector<double>& out, double& lse, double& top) const {
    const int64_t len = lengths[b], q_len = cu[b + 1] - cu[b], p = len - q_len + token - cu[b];
    const int64_t kv_head = h / c.group;
    std::vector<double> logits(len, -kInfinity);
    top = -kInfinity;
    for (int64_t j = 0; j < len; ++j) {
      if (!visible(j, p)) continue;
      double dot = 0;
      for (int64_t d = 0; d < c.head_dim; ++d) {
        dot += asked[(token * heads + h) * c.head_dim + d] * cached(0, slots[first_key[b] + j], kv_head, d);
        if (plain) dot = static_cast<float>(dot);
      }
      double x = dot * scale();
      if (c.cap) x = c.cap * std::tanh(x / c.cap);
      if (c.slopes) x -= slopes[h] * static_cast<double>(std::llabs(p - j));
      logits[j] = plain ? static_cast<float>(x) : x;
      top = std::max(top, logits[j]);
    }
    out.assign(value_dim(), 0);
    const double sink = c.sinks ? sinks[h] : -kInfinity, peak = std::max(top, sink);
    lse = peak;
    if (peak == -kInfinity) return;
    double sum = std::exp(sink - peak);
    for (int64_t j = 0; j < len; ++j) {
      if (logits[j] == -kInfinity) continue;
      const double weight = std::exp(logits[j] - peak);
      sum += weight;
      for (int64_t d = 0; d < value_dim(); ++d) {
        const double v = cached(c.latent ? 0 : 1, slots[first_key[b] + j], kv_head, d);
        out[d] += (plain ? rounded(weight, c.dtype) : weight) * v;
        if (plain) out[d] = static_cast<float>(out[d]);
      }
    }
    for (double& x : out) x = plain ? rounded(x / sum, c.dtype) : x / sum;
    lse = peak + std::log(sum);
  }
};

int failures = 0;

void report(const std::string& name, bool good, double error, double allowed) {
  std::printf("%-28s %s  error %.3g, allowed %.3g\n", name.c_str(), good ? "ok    " : "FAILED", error, allowed);
  failures += !good;
}

void check_attention(const Case& c) {
  Problem p(c);
  p.write();
  const int64_t rows = p.num_tokens * p.heads, width = p.value_dim();
  Buffer out;
  out.resize(c.dtype, rows * width);
  std::vector<float> lse(rows, NAN), top(rows, NAN);
  p.args.out = out.data();
  p.args.lse = lse.data();
  p.args.max_logits = top.data();
  attention(p.args);

  double error = 0, plain_error = 0, largest = 0, stats_error = 0, stats_allowed = 1;
  bool good = true;
  std::vector<double> exact, plain;
  for (int64_t b = 0; b < p.num_seqs; ++b)
    for (int64_t token = p.cu[b]; token < p.cu[b + 1]; ++token)
      for (int64_t h = 0; h < p.heads; ++h) {
        double exact_lse, exact_top, plain_lse, plain_top;
        p.row(b, token, h, false, exact, exact_lse, exact_top);
        p.row(b, token, h, true, plain, plain_lse, plain_top);
        const int64_t row = token * p.heads + h;
        for (int64_t d = 0; d < width; ++d) {
          const double got = out.at(row * width + d);
          good = good && std::isfinite(got);
          error = std::max(error, std::fabs(got - exact[d]));
          plain_error = std::max(plain_error, std::fabs(plain[d] - exact[d]));
          largest = std::max(largest, std::fabs(exact[d]));
        }
        const double logits_ulp = c.dtype == DType::f32 ? 0 : std::ldexp(1.0, -format(c.dtype).mantissa_bits);
        for (const auto& [got, want] : {std::pair<double, double>{lse[row], exact_lse}, {top[row], exact_top}}) {
          if (std::isinf(want) || std::isnan(got)) {
            good = good && got == want;
            continue;
          }
          stats_error = std::max(stats_error, std::fabs(got - want) / (1e-4 + (1e-5 + logits_ulp) * std::fabs(want)));
        }
      }
  const double allowed = 2 * plain_error + std::ldexp(1.0, -format(c.dtype).mantissa_bits) * largest + 1e-6;
  report(c.name, good && error <= allowed, error, allowed);
  report(c.name + " stats", good && stats_error <= stats_allowed, stats_error, stats_allowed);
}

void check_write_copy_gather(const Case& c) {
  Problem p(c);
  p.write();
  double error = 0;
  for (size_t t = 0; t < p.slots.size(); ++t)
    for (int64_t h = 0; h < c.num_kv_heads; ++h)
      for (int64_t d = 0; d < c.head_dim; ++d) {
        const int64_t source = (static_cast<int64_t>(t) * c.num_kv_heads + h) * c.head_dim + d;
        error = std::max(error, std::fabs(p.cached(0, p.slots[t], h, d) - p.keys.at(source)));
        error = std::max(error, std::fabs(p.cached(1, p.slots[t], h, d) - p.values.at(source)));
      }
  // Values lie below 2: a quantised row is off by half a step at most.
  const double step = c.cache_dtype == DType::i8 ? 2 / 127.0 : c.cache_dtype == DType::e4m3 ? 2 / 8.0 : 0;
  report(c.name + " write", error <= step / 2 * (1 + 1e-5), error, step / 2);

  // Swap two used blocks and their table entries: what is gathered stays the same.
  int32_t& first = p.tables[1 * p.table_width];
  int32_t& second = p.tables[4 * p.table_width];
  const int64_t source[3] = {first, second, -1}, target[3] = {second, first, 0};
  copy_blocks(p.args.cache, source, target, 3);
  std::swap(first, second);
  GatherArgs g;
  g.cache = p.args.cache;
  g.block_tables = p.tables.data(), g.table_stride = p.table_width;
  g.context_lens = p.lengths.data();
  g.num_seqs = p.num_seqs, g.max_len = 701;
  Buffer key, value;
  const DType result = is_quantized(c.cache_dtype) ? DType::f32 : c.cache_dtype;
  key.resize(result, p.num_seqs * c.num_kv_heads * g.max_len * c.stored_dim);
  value = key;
  g.key = key.data(), g.value = value.data();
  gather_cache(g);
  double gathered = 0;
  for (int64_t s = 0; s < p.num_seqs; ++s)
    for (int64_t h = 0; h < c.num_kv_heads; ++h)
      for (int64_t j = 0; j < g.max_len; ++j)
        for (int64_t d = 0; d < c.head_dim; ++d) {
          const int64_t at = ((s * c.num_kv_heads + h) * g.max_len + j) * c.stored_dim + d;
          const bool live = j < p.lengths[s];
          const int64_t slot = live ? p.slots[p.first_key[s] + j] : 0;
          const double want_key = live ? static_cast<float>(p.cached(0, slot, h, d)) : 0;
          const double want_value = live ? static_cast<float>(p.cached(1, slot, h, d)) : 0;
          const double worst = std::max(std::fabs(key.at(at) - want_key), std::fabs(value.at(at) - want_value));
          gathered = std::isnan(worst) ? kInfinity : std::max(gathered, worst);
        }
  report(c.name + " copy, gather", gathered == 0, gathered, 0);
}

void check_merge() {
  const float outs[2] = {1, 5}, lses[2] = {std::log(3.0f), 0}, sink = std::log(4.0f);
  float out = 0, lse = 0;
  MergeArgs m;
  m.num_parts = 2, m.num_tokens = m.num_heads = m.head_dim = 1;
  m.outs = outs, m.lses = lses, m.sinks = &sink, m.out = &out, m.lse = &lse;
  merge_attention_states(m);
  const double error = std::max(std::fabs(out - 1.0), std::fabs(lse - std::log(8.0)));
  const double ulp = std::numeric_limits<float>::epsilon();
  report("merge with a sink", error <= 4 * ulp, error, 4 * ulp);
}

std::vector<Case> cases() {
  std::vector<Case> all;
  const auto add = [&](const std::string& name, auto change) {
    Case c;
    c.name = name;
    change(c);
    all.push_back(c);
  };
  for (const auto& [name, dtype] :
       {std::pair<std::string, DType>{"f32", DType::f32}, {"bf16", DType::bf16}, {"f16", DType::f16}}) {
    add("decode " + name, [d = dtype](Case& c) { c.dtype = c.cache_dtype = d; });
    add("prefill " + name, [d = dtype](Case& c) { c.dtype = c.cache_dtype = d, c.query_lens = {1, 5, 3, 100, 64}; });
    add("odd sizes " + name, [d = dtype](Case& c) {
      c.dtype = c.cache_dtype = d;
      c.head_dim = 37, c.stored_dim = 41, c.block_size = 3, c.group = 3;
    });
    for (const auto& [kind, cache] : {std::pair<std::string, DType>{"int8", DType::i8}, {"e4m3", DType::e4m3}})
      for (const int rank : {1, 2, 4})
        add(name + " " + kind + " rank " + std::to_string(rank),
            [d = dtype, q = cache, r = rank](Case& c) { c.dtype = d, c.cache_dtype = q, c.scales_rank = r; });
  }
  add("window, cap, sinks", [](Case& c) { c.window = 50, c.cap = 1.5, c.sinks = true; });
  add("prefill window, cap, sinks", [](Case& c) {
    c.window = 50, c.cap = 1.5, c.sinks = true, c.query_lens = {2, 17, 1, 90, 300};
  });
  // A tile of an odd number of rows ends with one that is no query's.
  add("prefill slopes, odd rows", [](Case& c) { c.slopes = true, c.group = 3, c.query_lens = {1, 7, 0, 100, 85}; });
  add("chunk", [](Case& c) { c.chunk = 64, c.query_lens = {1, 3, 0, 70, 200}; });
  add("not causal", [](Case& c) { c.causal = false, c.query_lens = {3, 17, 1, 2, 40}; });
  add("latent", [](Case& c) { c.latent = true, c.num_kv_heads = 1, c.head_dim = c.stored_dim = 72, c.value_dim = 64; });
  return all;
}

}  // namespace

int main() {
  std::printf("kernels: %s\n", isa_name());
  for (const Case& c : cases()) {
    check_attention(c);
    if (!c.latent && c.scales_rank != 1 && c.scales_rank != 2) check_write_copy_gather(c);
  }
  check_merge();
  std::printf(failures ? "%d checks failed\n" : "all checks passed\n", failures);
  return failures ? 1 : 0;
}
