// The sum of a block on the CPU, in 16 lanes whatever the vector width, the lanes in a fixed tree: it depends neither
// on the instruction set nor on the number of threads.
#pragma once

namespace genkern {
namespace GENKERN_ISA {
namespace {

constexpr int kLanes = 16;

// The sum of term(i), i from 0 to count - 1.
template <typename Acc, typename Term>
double sum_block(int count, Term term) {
  Acc lanes[kLanes] = {};
  int i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int l = 0; l < kLanes; ++l) lanes[l] += term(i + l);
  for (int l = 0; i + l < count; ++l) lanes[l] += term(i + l);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int l = 0; l < width; ++l) lanes[l] += lanes[l + width];
  return static_cast<double>(lanes[0]);
}

}  // namespace
}  // namespace GENKERN_ISA
}  // namespace genkern
