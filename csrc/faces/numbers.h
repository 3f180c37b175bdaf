// A call's numbers as bytes: what both faces read of a row that was laid out before the call (genkern/spec.py writes
// it).
//
// 64-bit words, the bytes in the order of memory:
//   a byte each of formula, noise, use_pred, kind, lengths of row and of values, blended, 0; seed; stream; draw; row;
//   cells; scales.
#pragma once

#include <array>
#include <cstring>
#include <string>

#include "call.h"

namespace genkern {

constexpr size_t kHeaderBytes = 8 + 3 * sizeof(int64_t);

// The bytes that a text of hexadecimal digits names.
inline std::string bytes_of(const char* digits, size_t count) {
  static const auto value_of = [] {
    std::array<uint8_t, 256> values{};
    for (int c = 0; c < 10; ++c) values['0' + c] = static_cast<uint8_t>(c);
    for (int c = 0; c < 6; ++c) values['a' + c] = static_cast<uint8_t>(10 + c);
    return values;
  }();
  std::string bytes(count / 2, '\0');
  for (size_t k = 0; k < bytes.size(); ++k, digits += 2) {
    bytes[k] =
        static_cast<char>(value_of[static_cast<uint8_t>(digits[0])] << 4 | value_of[static_cast<uint8_t>(digits[1])]);
  }
  return bytes;
}

// Sets the numbers of a call; returns its kind of reduction.
inline int64_t read_numbers(const char* bytes, size_t size, Call& call) {
  expect(size >= kHeaderBytes, "numbers: expected at least ", kHeaderBytes, " bytes, got ", size);
  const auto* head = reinterpret_cast<const uint8_t*>(bytes);
  const size_t n_row = head[4], n_values = head[5], expected = kHeaderBytes + 8 * (n_row + 2 * n_values);
  expect(size == expected, "numbers: expected ", expected, " bytes, got ", size);
  const char* next = bytes + 8;
  auto take = [&next](auto& into, size_t count) {
    into.resize(count);
    std::memcpy(into.data(), next, count * sizeof(into[0]));
    next += count * sizeof(into[0]);
  };
  call.formula = head[0];
  call.noise = head[1];
  call.use_pred = head[2] != 0;
  call.blended = head[6];
  take(call.key, 3);
  take(call.row, n_row);
  take(call.cells, n_values);
  take(call.scales, n_values);
  return head[3];
}

// The same bytes of a call.
inline std::string write_numbers(const Call& call, int64_t kind) {
  const uint8_t head[8] = {static_cast<uint8_t>(call.formula),    static_cast<uint8_t>(call.noise),
                           static_cast<uint8_t>(call.use_pred),   static_cast<uint8_t>(kind),
                           static_cast<uint8_t>(call.row.size()), static_cast<uint8_t>(call.cells.size()),
                           static_cast<uint8_t>(call.blended)};
  std::string bytes(reinterpret_cast<const char*>(head), sizeof(head));
  auto put = [&bytes](const auto& from) {
    bytes.append(reinterpret_cast<const char*>(from.data()), from.size() * sizeof(from[0]));
  };
  const std::vector<int64_t> no_key(3);
  put(call.key.empty() ? no_key : call.key);
  put(call.row);
  put(call.cells);
  put(call.scales);
  return bytes;
}

}  // namespace genkern
