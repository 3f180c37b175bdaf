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

  void begin(Digit<Acc> of, uint64_t head) {
    digit = of, prefix = head, nans = 0, above = ~uint64_t{0};
    std::fill(bins, bins + kBins, 0);
  }

  uint64_t key_at(int bin) const { return prefix << digit.width | static_cast<uint64_t>(bin); }

  // The bin of the number of a rank, which becomes its rank in the bin.
  int find(uint64_t& rank) const {
    int bin = 0;
    for (; rank >= bins[bin]; ++bin) rank -= bins[bin];
    return bin;
  }

  // Of the last digit: the number of a rank, toward the next.
  Acc answer(uint64_t rank, double rest) const {
    int bin = find(rank);
    Acc low, high;
    value_of(key_at(bin), low);
    if (rest == 0.0) return low;
    if (rank + 1 >= bins[bin]) {
      for (++bin; bin < kBins && bins[bin] == 0;) ++bin;
    }
    value_of(bin < kBins ? key_at(bin) : above, high);
    return interpolate(low, high, rest);
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

// The counts of the samples that a thread comes by, merged into those of all threads one sample after another.
template <typename Acc>
struct Part {
  std::vector<Counts<Acc>>& all;
  Counts<Acc> some;
  int64_t b = -1;

  explicit Part(std::vector<Counts<Acc>>& counts) : all(counts) {}
  void add(int64_t sample, const Acc* values, int count) {
    if (sample != b) {
      finish();
      b = sample;
      some.begin(all[static_cast<size_t>(b)].digit, all[static_cast<size_t>(b)].prefix);
    }
    some.add(values, count);
  }
  void finish() {
    if (b >= 0) all[static_cast<size_t>(b)].merge(some);
  }
};

// Samples of many elements, counted once a digit.
template <typename Acc>
void large_quantiles(const ValuesCpu& cpu, const Place& place, Acc* out, const Parallel& parallel) {
  const auto batch = static_cast<size_t>(cpu.walk->batch);
  std::vector<Counts<Acc>> all(batch);
  std::vector<uint64_t> ranks(batch, place.rank);
  for (int d = 0; d < Digit<Acc>::kCount; ++d) {
    over_tasks(parallel, grain(*cpu.walk), 0, cpu.walk->batch * chunks_per_sample(cpu.walk->n),
               [&](int64_t begin, int64_t end) {
                 Part<Acc> part(all);
                 ValuesCpu own = cpu;
                 own.context = &part;
                 own.take = [](void* c, int64_t b, const void* values, int count) {
                   static_cast<Part<Acc>*>(c)->add(b, static_cast<const Acc*>(values), count);
                 };
                 chosen_isa()->values(own, begin, end);
                 part.finish();
               });
    for (size_t b = 0; b < batch; ++b) {
      Counts<Acc>& counts = all[b];
      if (counts.nans != 0) {
        out[b] = std::numeric_limits<Acc>::quiet_NaN();
        continue;
      }
      if (d + 1 == Digit<Acc>::kCount) {
        out[b] = counts.answer(ranks[b], place.rest);
      } else {
        const int bin = counts.find(ranks[b]);
        counts.begin(Digit<Acc>(d + 1), counts.key_at(bin));
      }
    }
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
    large_quantiles<Acc>(cpu, place, out, parallel);
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
