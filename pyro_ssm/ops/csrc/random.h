// Standard normals: xoshiro128++ (Blackman and Vigna 2021) in LANES_RANDOM independent lanes, then Box and Muller (1958).
//
// A chunk of numbers starts from a state that splitmix64 (Steele, Lea and Flood 2014) makes of the seed and the chunk's
// index: chunks may be drawn in any order, by any number of threads, with any instruction set.

constexpr int LANES_RANDOM = 32;

static inline uint64_t mixed(uint64_t seed, uint64_t index) {
    uint64_t z = seed + (index + 1) * 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

struct Uniform {
    uint32_t s0[LANES_RANDOM], s1[LANES_RANDOM], s2[LANES_RANDOM], s3[LANES_RANDOM];

    Uniform(uint64_t seed, uint64_t chunk) {
        for (int l = 0; l < LANES_RANDOM; ++l) {
            const uint64_t at = 2 * (chunk * LANES_RANDOM + (uint64_t)l);
            const uint64_t x = mixed(seed, at), y = mixed(seed, at + 1);
            s0[l] = (uint32_t)x, s1[l] = (uint32_t)(x >> 32), s2[l] = (uint32_t)y, s3[l] = (uint32_t)(y >> 32) | 1;
        }
    }
    void next(uint32_t* out) {
        for (int l = 0; l < LANES_RANDOM; ++l) {
            uint32_t a = s0[l], b = s1[l], c = s2[l], d = s3[l];
            const uint32_t r = a + d, t = b << 9;
            out[l] = ((r << 7) | (r >> 25)) + a;
            c ^= a, d ^= b, b ^= c, a ^= d, c ^= t;
            s0[l] = a, s1[l] = b, s2[l] = c, s3[l] = (d << 11) | (d >> 21);
        }
    }
};

// Two normals a lane: the radius from one word, the angle from the other: its last two bits are the quadrant.
static inline void box_muller(const uint32_t* radius, const uint32_t* angle, float* out) {
    for (int l = 0; l < LANES_RANDOM; ++l) {
        // 31 bits in (0, 1]: the middle of their interval. From signed integers, which every processor converts
        const float u = (float)(int32_t)(radius[l] >> 1) * 4.656612873e-10f + 2.328306437e-10f;
        const float r = std::sqrt(-2.0f * logarithm(u > 1.0f ? 1.0f : u));
        const float x = (float)(int32_t)(angle[l] >> 2) * (1.570796327f / 1073741824.0f) - 0.785398163f;
        const float s = sine(x), c = cosine(x);  // of the angle less pi / 4
        const float along = r * ((c - s) * 0.707106781f), across = r * ((c + s) * 0.707106781f);
        out[l] = bits_of<float>(bits_of<uint32_t>(along) ^ ((angle[l] & 1u) << 31));
        out[LANES_RANDOM + l] = bits_of<float>(bits_of<uint32_t>(across) ^ ((angle[l] & 2u) << 30));
    }
}

static void normals(uint64_t seed, i64 chunk, i64 count, float* out) {
    Uniform uniform(seed, (uint64_t)chunk);
    uint32_t radius[LANES_RANDOM], angle[LANES_RANDOM];
    constexpr i64 PAIR = 2 * LANES_RANDOM;
    i64 i = 0;
    for (; i + PAIR <= count; i += PAIR) {
        uniform.next(radius);
        uniform.next(angle);
        box_muller(radius, angle, out + i);
    }
    if (i == count) return;
    float rest[PAIR];
    uniform.next(radius);
    uniform.next(angle);
    box_muller(radius, angle, rest);
    std::memcpy(out + i, rest, sizeof(float) * (size_t)(count - i));
}
