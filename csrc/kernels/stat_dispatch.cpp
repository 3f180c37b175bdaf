// The front of stat on the CPU: the sums of the chunks in their order, and the selection of a quantile.
#include <algorithm>
#include <limits>
#include <vector>

#include "isa.h"

namespace genkern {
namespace {

// Elements of a sample up to which it is one thread's, sorted as far as it takes; longer ones are counted by all.
constexpr int64_t kSorted = 8 * kChunk;

// A parallel loop over tasks [first, first + count), run(begin, end).
template <typename Run>
void over_tasks(const Parallel& parallel, int64_t grain, int64_t first, int64_t count, const Run& run) {
  struct Context {
    const Run* run;
    int64_t first;
  } context{&run, first};
  parallel.run(count, grain, &context, [](void* c, int64_t begin, int64_t end) {
    const auto* context = static_cast<const Context*>(c);
    (*context->run)(context->first + begin, context->first + end);
  });
}

// The numbers of rank and of the next rank, where it is asked for.
template <typename Acc>
Acc quantile_of(std::vector<Acc>& values, const Place& place) {
  const auto at = values.begin() + static_cast<int64_t>(place.rank);
  std::nth_element(values.begin(), at, values.end());
  const Acc low = *at;
  return place.rest == 0.0 ? low : interpolate(low, *std::min_element(at + 1, values.end()), place.rest);
}

template <typename Acc>
Acc absolute(Acc v) {
  return std::fabs(v);
}

// Samples [begin, end), each sorted as far as it takes when it has come out of the row.
template <typename Acc>
void small_quantiles(const ValuesCpu& cpu, const Place& place, Acc* out, int64_t begin, int64_t end) {
  struct Sample {
    std::vector<Acc> values;
    int64_t n;
    Place place;
    Acc* out;
  } sample{{}, cpu.walk->n, place, out};
  ValuesCpu own = cpu;
  own.context = &sample;
  own.take = [](void* c, int64_t b, const void* from, int count) {
    auto* sample = static_cast<Sample*>(c);
    const auto* values = static_cast<const Acc*>(from);
    for (int i = 0; i < count; ++i) sample->values.push_back(absolute(values[i]));
    if (static_cast<int64_t>(sample->values.size()) < sample->n) return;
    const auto nan = [](Acc v) { return v != v; };
    sample->out[b] = std::any_of(sample->values.begin(), sample->values.end(), nan)
                         ? std::numeric_limits<Acc>::quiet_NaN()
                         : quantile_of(sample->values, sample->place);
    sample->values.clear();
  };
  const int64_t chunks = chunks_per_sample(cpu.walk->n);
  chosen_isa()->values(own, begin * chunks, end * chunks);
}

// How many numbers of a sample have which digit, among those that agree in the digits before it.
template <typename Acc>
struct Counts {
  Digit<Acc> digit{0};
  uint64_t prefix = 0;
  uint64_t bins[kBins] = {};
  uint64_t nans = 0;
  uint64_t above = ~uint64_t{0};  // the least key of a higher prefix

  void add(const Acc* values, int count) {
    for (int i = 0; i < count; ++i) {
      const Acc v = absolute(values[i]);
      if (v != v) {
        ++nans;
        continue;
      }
      const uint64_t key = key_of(v), head = digit.prefix(key);
      if (head == prefix) ++bins[digit.bin(key)];
      if (head > prefix) above = std::min(above, key);
    }
  }

  void merge(const Counts& other) {
    for (int k = 0; k < kBins; ++k)
      if (other.bins[k] != 0) __atomic_fetch_add(&bins[k], other.bins[k], __ATOMIC_RELAXED);
    __atomic_fetch_add(&nans, other.nans, __ATOMIC_RELAXED);
    uint64_t known = __atomic_load_n(&above, __ATOMIC_RELAXED);
    while (other.above < known &&
           !__atomic_compare_exchange_n(&above, &known, other.above, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
  }
};

// A sample of several chunks, counted once a digit.
template <typename Acc>
Acc large_quantile(const ValuesCpu& cpu, const Place& place, int64_t b, const Parallel& parallel) {
  const int64_t chunks = chunks_per_sample(cpu.walk->n);
  uint64_t prefix = 0, rank = place.rank;
  for (int d = 0;; ++d) {
    Counts<Acc> all;
    all.digit = Digit<Acc>(d);
    all.prefix = prefix;
    over_tasks(parallel, grain(*cpu.walk), b * chunks, chunks, [&](int64_t begin, int64_t end) {
      Counts<Acc> some;
      some.digit = all.digit;
      some.prefix = prefix;
      ValuesCpu own = cpu;
      own.context = &some;
      own.take = [](void* c, int64_t, const void* values, int count) {
        static_cast<Counts<Acc>*>(c)->add(static_cast<const Acc*>(values), count);
      };
      chosen_isa()->values(own, begin, end);
      all.merge(some);
    });
    if (all.nans != 0) return std::numeric_limits<Acc>::quiet_NaN();
    int bin = 0;
    for (; rank >= all.bins[bin]; ++bin) rank -= all.bins[bin];
    const auto key_at = [&](int k) { return prefix << all.digit.width | static_cast<uint64_t>(k); };
    if (d + 1 < Digit<Acc>::kCount) {
      prefix = key_at(bin);
      continue;
    }
    Acc low, high;
    value_of(key_at(bin), low);
    uint64_t next = key_at(bin);
    if (rank + 1 >= all.bins[bin]) {
      for (++bin; bin < kBins && all.bins[bin] == 0;) ++bin;
      next = bin < kBins ? key_at(bin) : all.above;
    }
    if (place.rest == 0.0) return low;
    value_of(next, high);
    return interpolate(low, high, place.rest);
  }
}

template <typename Acc>
void quantile_typed(const QuantileArgs& args, const Walk& walk, const Parallel& parallel) {
  auto* out = static_cast<Acc*>(args.out);
  const ValuesCpu cpu{&args.map, &walk, nullptr, nullptr};
  const Place place = place_of(args.q, walk.n);
  if (walk.n == 0) {
    std::fill(out, out + walk.batch, std::numeric_limits<Acc>::quiet_NaN());
  } else if (walk.n <= kSorted) {
    over_tasks(parallel, (kGrainElements + walk.n - 1) / walk.n, 0, walk.batch,
               [&](int64_t begin, int64_t end) { small_quantiles(cpu, place, out, begin, end); });
  } else {
    for (int64_t b = 0; b < walk.batch; ++b) out[b] = large_quantile<Acc>(cpu, place, b, parallel);
  }
}

}  // namespace

size_t stat_workspace_cpu(const MapArgs& args) {
  const Walk walk = make_walk(args, /*keep_samples=*/true);
  return static_cast<size_t>(walk.batch * chunks_per_sample(walk.n)) * kMaxSums * sizeof(double);
}

size_t quantile_workspace_cpu(const MapArgs&) { return 0; }

void stat_cpu(const StatArgs& args, const Parallel& parallel) {
  const Walk walk = make_walk(args.map, /*keep_samples=*/true);
  const int64_t chunks = chunks_per_sample(walk.n);
  const int n_sums = sums_of(args.kind, args.map.n_out);
  const StatCpu cpu{&args, &walk, static_cast<double*>(args.workspace)};
  if (walk.batch > 0 && walk.n > 0)
    over_tasks(parallel, grain(walk), 0, walk.batch * chunks,
               [&](int64_t begin, int64_t end) { chosen_isa()->stat(cpu, begin, end); });
  for (int64_t b = 0; b < walk.batch; ++b) {
    for (int k = 0; k < n_sums; ++k) {
      double sum = 0.0;
      for (int64_t c = 0; c < chunks; ++c) sum += cpu.partials[(b * chunks + c) * n_sums + k];
      args.sums[b * n_sums + k] = sum;
    }
  }
}

void quantile_cpu(const QuantileArgs& args, const Parallel& parallel) {
  const Walk walk = make_walk(args.map, /*keep_samples=*/true);
  args.map.f64 ? quantile_typed<double>(args, walk, parallel) : quantile_typed<float>(args, walk, parallel);
}

}  // namespace genkern
