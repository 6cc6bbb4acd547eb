// Which crops an image has: docs/formats.md, "replayed". Integers alone, so that every machine draws the same.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace ferkd::crops {

constexpr int TRIES = 10, ASPECTS = 1024;

// The constants of a store: scale and ratio in fixed point, and the table of aspects. A view of the words that ferkd/crops.py laid out; they
// may lie at any address.
class Settings {
  const char* bytes_;  // first: the others are read from it
  uint64_t word(uint32_t i) const {
    uint64_t value;
    std::memcpy(&value, bytes_ + 8 * i, sizeof value);
    return value;
  }

 public:
  static constexpr int WORDS = 6 + 2 * ASPECTS;
  explicit Settings(const char* bytes) : bytes_(bytes) {}
  uint64_t seed = word(0), flip = word(1);
  uint64_t scale_low = word(2), scale_high = word(3);  // 0.32
  uint64_t ratio_low = word(4), ratio_high = word(5);  // 16.16
  uint64_t aspect(uint32_t m) const { return word(6 + m); }
  uint64_t inverse(uint32_t m) const { return word(6 + ASPECTS + m); }
};

struct Box {
  int32_t left, top, width, height;
};

struct Random {
  uint32_t a, b, c, d;
};

// Philox4x32-10.
inline Random philox(uint32_t x0, uint32_t x1, uint32_t k0, uint32_t k1) {
  uint32_t x2 = 0, x3 = 0;
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t(x0) * 0xD2511F53u, product1 = uint64_t(x2) * 0xCD9E8D57u;
    x0 = uint32_t(product1 >> 32) ^ x1 ^ k0;
    x1 = uint32_t(product1);
    x2 = uint32_t(product0 >> 32) ^ x3 ^ k1;
    x3 = uint32_t(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {x0, x1, x2, x3};
}

// The whole part of the square root. A double holds it to within one: the conversion may have rounded up to the next square, or down.
inline uint64_t isqrt(uint64_t n) {
  uint64_t root = uint64_t(std::sqrt(double(n)));
  while (root > 0xFFFFFFFFull || root * root > n) --root;
  while (root < 0xFFFFFFFFull && (root + 1) * (root + 1) <= n) ++root;
  return root;
}

// The largest centred box of an allowed aspect: for a crop whose tries all missed.
inline Box centre(const Settings& s, uint64_t width, uint64_t height) {
  uint64_t w = width, h = height;
  if (width << 16 < height * s.ratio_low) {
    h = ((width << 17) + s.ratio_low) / (2 * s.ratio_low);
    h = h > 1 ? h : 1;
  } else if (width << 16 > height * s.ratio_high) {
    w = (height * s.ratio_high + (1u << 15)) >> 16;
    w = w > 1 ? w : 1;
  }
  return {int32_t((width - w) / 2), int32_t((height - h) / 2), int32_t(w), int32_t(h)};
}

// The box of an image's crop, and whether it is flipped. Sides from 1 to 32,767 pixels.
inline Box draw(const Settings& s, uint32_t image, uint32_t crop, uint64_t width, uint64_t height, bool& flip) {
  for (uint32_t t = 0; t < TRIES; ++t) {
    const Random r = philox(crop, t, uint32_t(s.seed), image);
    if (t == 0) flip = s.flip && (r.b & 1);
    const uint64_t share = s.scale_low + (uint64_t(r.a) * (s.scale_high - s.scale_low) >> 32);
    const uint64_t area = width * height * share >> 16;
    const uint32_t m = r.b >> 22;
    const uint64_t w = (isqrt(area * s.aspect(m)) + (1u << 15)) >> 16;
    const uint64_t h = (isqrt(area * s.inverse(m)) + (1u << 15)) >> 16;
    if (w >= 1 && w <= width && h >= 1 && h <= height) {
      return {int32_t(r.c * (width - w + 1) >> 32), int32_t(r.d * (height - h + 1) >> 32), int32_t(w), int32_t(h)};
    }
  }
  return centre(s, width, height);
}

// A stored box: left | top << 15 | width << 30 | height << 45 | flip << 60.
inline Box unpack(uint64_t word, bool& flip) {
  flip = word >> 60 & 1;
  return {int32_t(word & 0x7FFF), int32_t(word >> 15 & 0x7FFF), int32_t(word >> 30 & 0x7FFF), int32_t(word >> 45 & 0x7FFF)};
}

}  // namespace ferkd::crops
