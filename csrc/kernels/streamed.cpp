// An ordinary store into a line that no cache holds reads the line first: a pass with two inputs then moves four arrays
// where its formula has three. A streaming store writes the line to memory, unread, and whoever reads it next finds it
// there. On two cores of an EPYC with 32 MiB of last cache, x and m to out in float32:
//
//   64 MiB an array       0.71 of the time of ordinary stores (AVX2: 0.77); 0.80 with a pass after it that reads out
//   8 MiB, 2 MiB          1.18 and 2.1, with that pass: all arrays would stay in the cache
//   out is x              no line is read for the store's sake: nothing to gain
//   out is of new pages   1.07 to 1.17: the system has just zeroed each page by way of the cache
//   noise is drawn        0.93 to 1.09: the draw is what takes the time, and ordinary stores wait beside it
//   out has 16 bits       0.93 to 1.03: a vector is half a line, or a quarter
#include "streamed.h"

#include <sys/mman.h>
#include <unistd.h>

#include <fstream>

#include "rows.h"

namespace genkern {
namespace {

int64_t bytes_of(const MapArgs& args, const Array& array) {
  if (array.data == nullptr) return 0;
  int64_t bytes = size_of(array.dtype);
  for (int d = 0; d < args.ndim; ++d) bytes *= args.sizes[d];
  return bytes;
}

// Bytes of the cache that the cores share. (glibc's sysconf says 320 MiB on a machine whose cores share 32.)
int64_t last_cache() {
  static const int64_t bytes = [] {
    std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index3/size");  // "32768K"
    int64_t kib = 0;
    return file >> kib ? kib << 10 : int64_t{32} << 20;
  }();
  return bytes;
}

// Whether the page of the last element is there; it is not in memory that was never written.
bool has_pages(const MapArgs& args, const Array& array) {
  int64_t last = 0;
  for (int d = 0; d < args.ndim; ++d) last += (args.sizes[d] - 1) * array.strides[d];
  const auto at = reinterpret_cast<uintptr_t>(array.data) + static_cast<uintptr_t>(last * size_of(array.dtype));
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  unsigned char found = 0;
  return mincore(reinterpret_cast<void*>(at / page * page), 1, &found) == 0 && (found & 1) != 0;
}

}  // namespace

uint32_t streamed_outputs(const MapArgs& args) {
  if (args.noise.draw_kind != Draw::none) return 0;
  int64_t bytes = 0;
  for (const Array& array : args.in) bytes += bytes_of(args, array);
  for (int j = 0; j < args.n_out; ++j) bytes += bytes_of(args, args.out[j]);
  if (bytes <= last_cache()) return 0;
  uint32_t found = 0;
  for (int j = 0; j < args.n_out; ++j) {
    const Array& out = args.out[j];
    bool is_input = false;
    for (const Array& array : args.in) is_input = is_input || array.data == out.data;
    const bool whole = out.dtype == (args.f64 ? DType::f64 : DType::f32);  // vectors are stored as they are
    if (whole && !is_input && has_pages(args, out)) found |= 1u << j;
  }
  return found;
}

}  // namespace genkern
