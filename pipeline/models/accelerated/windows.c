/* A convolution of grey images, BatchNorm, a lower bound, dropout and max pooling, and their gradients; geometry by
   macros, from windows.py.

   All that one image needs stays in the cache. It is taken apart into planes first (`pack`): pixel (y, x), padding
   included, is in plane (y % STRIDE)·STRIDE + x % STRIDE, at (y / STRIDE, x / STRIDE), so that what a filter's tap sees
   along a row of outputs lies side by side. Filters that BatchNorm scales by a negative factor are turned around: the largest value is
   then the largest after scaling too, and pooling comes first. Sums run in one order, whatever the number of threads.
   Functions that are called from outside return 0, or 1 if there is no memory. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum {
  LANES = 8,                                     /* floats computed on at once */
  BLOCK = 5,                                     /* filters whose sums stay in registers together */
  TAPS = KERNEL * KERNEL,
  PLANE = PHASE_HEIGHT * PHASE_WIDTH,
  PIXELS = HEIGHT * WIDTH,                       /* of an image */
  VALUES = STRIDE * STRIDE * PLANE,              /* of its planes */
  VECTORS = (OUT_WIDTH + LANES - 1) / LANES,     /* of a row of outputs */
  ROW = VECTORS * LANES,                         /* what follows OUT_WIDTH is 0 */
  MAP = OUT_HEIGHT * ROW,
  BLOCKS = (FILTERS + BLOCK - 1) / BLOCK,
  ROWS = OUT_HEIGHT % 2 ? 1 : 2,                 /* rows whose sums stay in registers together */
  POOLED_WIDTH = OUT_WIDTH / POOL,
  POOLED_HEIGHT = OUT_HEIGHT / POOL,
  POOLED = POOLED_HEIGHT * POOLED_WIDTH,
  IMAGES = 4800 / (VALUES + BLOCKS * BLOCK * MAP) + 1, /* whose gradients are computed together, in the cache */
};

typedef float vector __attribute__((vector_size(4 * LANES)));
typedef vector loose __attribute__((aligned(4), may_alias)); /* anywhere in an array of floats */

/* What a filter's outputs go through: turned by a sign, scaled by factor, which is |gamma| · inverse_std, and shifted so
   that centre becomes beta. */
typedef struct {
  double sign, centre, inverse_std, factor;
} norm;

/* Where in the planes a pixel is; for a filter's tap, where the first output finds what it takes. */
static inline int place_of(int y, int x) {
  return (y % STRIDE * STRIDE + x % STRIDE) * PLANE + y / STRIDE * PHASE_WIDTH + x / STRIDE;
}

/* image (HEIGHT, WIDTH) → planes (VALUES), of which padding stays as it is: 0 */
static inline void pack(const uint8_t *image, uint8_t *planes) {
  for (int y = PADDING; y < HEIGHT + PADDING; y++)
#pragma GCC unroll 64
    for (int x = PADDING; x < WIDTH + PADDING; x++) planes[place_of(y, x)] = *image++;
}

/* pixels (HEIGHT, WIDTH) → planes (VALUES), the rest of which stays 0, so that padding is 0 when standardized */
static void arrange(const float *pixels, float *planes) {
  for (int y = PADDING; y < HEIGHT + PADDING; y++)
    for (int x = PADDING; x < WIDTH + PADDING; x++) planes[place_of(y, x)] = *pixels++;
}

/* image (HEIGHT, WIDTH); planes, means and factors (VALUES) → values (VALUES) */
static inline void standardize(const uint8_t *image, uint8_t *planes, const float *means, const float *factors,
                               float *restrict values) {
  pack(image, planes);
  for (int i = 0; i < VALUES; i++) values[i] = (planes[i] - means[i]) * factors[i];
}

/* values (VALUES + ROW), filters (BLOCKS, TAPS, BLOCK) → maps (BLOCKS · BLOCK, OUT_HEIGHT, ROW) */
static inline void convolve(const float *values, const float *filters, float *maps) {
  vector inside[VECTORS];
  for (int v = 0; v < VECTORS; v++)
    for (int lane = 0; lane < LANES; lane++) inside[v][lane] = v * LANES + lane < OUT_WIDTH;
  for (int block = 0; block < BLOCKS; block++)
    for (int row = 0; row < OUT_HEIGHT; row += ROWS)
      for (int v = 0; v < VECTORS; v++) {
        vector sums[ROWS][BLOCK] = {0};
        const float *weights = filters + block * TAPS * BLOCK;
        for (int y = 0; y < KERNEL; y++, weights += KERNEL * BLOCK) {
          const float *seen = values + y % STRIDE * STRIDE * PLANE + (row + y / STRIDE) * PHASE_WIDTH + v * LANES;
#pragma GCC unroll 16
          for (int x = 0; x < KERNEL; x++)
#pragma GCC unroll 2
            for (int r = 0; r < ROWS; r++) {
              vector pixels = *(const loose *)(seen + x % STRIDE * PLANE + x / STRIDE + r * PHASE_WIDTH);
#pragma GCC unroll 5
              for (int f = 0; f < BLOCK; f++) sums[r][f] += pixels * weights[x * BLOCK + f];
            }
        }
        for (int r = 0; r < ROWS; r++)
          for (int f = 0; f < BLOCK; f++)
            *(loose *)(maps + (block * BLOCK + f) * MAP + (row + r) * ROW + v * LANES) = sums[r][f] * inside[v];
      }
}

/* One map (OUT_HEIGHT, ROW) → its maxima (POOLED) and where in its window each is; of equal ones the first. */
static inline void pool(const float *map, float *maxima, uint8_t *places) {
  for (int y = 0; y < POOLED_HEIGHT; y++)
    for (int x = 0; x < POOLED_WIDTH; x++) {
      const float *window = map + y * POOL * ROW + x * POOL;
      float maximum = window[0];
      int place = 0;
      for (int k = 1; k < POOL * POOL; k++) {
        float value = window[k / POOL * ROW + k % POOL];
        int is_larger = value > maximum;
        maximum = is_larger ? value : maximum;
        place += (k - place) * is_larger; /* branch-free: a branch would be mispredicted */
      }
      maxima[y * POOLED_WIDTH + x] = maximum;
      places[y * POOLED_WIDTH + x] = place;
    }
}

/* images (n, HEIGHT, WIDTH), mean and inverse_std (HEIGHT, WIDTH), weight (FILTERS, TAPS), signs of norms →
   maxima (n, FILTERS, POOLED); moments: means of all values before pooling, and of their squares; unless NULL:
   maps (n, FILTERS, MAP) and places (n, FILTERS, POOLED), for filter_gradient. */
static int convolve_and_pool(int64_t n, const uint8_t *images, const float *mean, const float *inverse_std,
                             const float *weight, const norm *norms, float *maxima, double moments[2][FILTERS],
                             float *maps, uint8_t *places) {
  struct {
    float values[VALUES + ROW] __attribute__((aligned(64))), maps[BLOCKS * BLOCK * MAP] __attribute__((aligned(64)));
    float filters[BLOCKS * TAPS * BLOCK];
    float means[VALUES], factors[VALUES];
    double sums[FILTERS][LANES], squares[FILTERS][LANES];
    uint8_t places[POOLED], planes[VALUES];
  } *own = aligned_alloc(64, (sizeof *own + 63) / 64 * 64);
  if (!own) return 1;
  memset(own, 0, sizeof *own);
  arrange(mean, own->means);
  arrange(inverse_std, own->factors);
  for (int f = 0; f < FILTERS; f++)
    for (int tap = 0; tap < TAPS; tap++)
      own->filters[(f / BLOCK * TAPS + tap) * BLOCK + f % BLOCK] = norms[f].sign * weight[f * TAPS + tap];
  for (int64_t i = 0; i < n; i++) {
    standardize(images + i * PIXELS, own->planes, own->means, own->factors, own->values);
    convolve(own->values, own->filters, own->maps);
    if (maps) memcpy(maps + i * FILTERS * MAP, own->maps, sizeof(float) * FILTERS * MAP);
    for (int f = 0; f < FILTERS; f++) {
      const float *map = own->maps + f * MAP;
      pool(map, maxima + (i * FILTERS + f) * POOLED, places ? places + (i * FILTERS + f) * POOLED : own->places);
      vector sum = {0}, square = {0};
      for (int at = 0; at < MAP; at += LANES) {
        vector values = *(const loose *)(map + at);
        sum += values;
        square += values * values;
      }
      for (int lane = 0; lane < LANES; lane++) {
        own->sums[f][lane] += sum[lane];
        own->squares[f][lane] += square[lane];
      }
    }
  }
  double count = (double)n * OUT_HEIGHT * OUT_WIDTH;
  for (int f = 0; f < FILTERS; f++) {
    moments[0][f] = moments[1][f] = 0;
    for (int lane = 0; lane < LANES; lane++) {
      moments[0][f] += own->sums[f][lane] / count;
      moments[1][f] += own->squares[f][lane] / count;
    }
  }
  free(own);
  return 0;
}

/* Values (FILTERS, POOLED) of one image become 0 where a random number of 16 bits is below least, and are multiplied by
   kept elsewhere. Every step of SplitMix64 (Steele, Lea, Flood 2014) gives four such numbers. */
static inline void drop(float *restrict values, uint64_t *state, int least, float kept) {
  union {
    uint64_t drawn[(FILTERS * POOLED + 3) / 4];
    uint16_t words[(FILTERS * POOLED + 3) / 4 * 4];
  } random;
  uint64_t start = *state;
  for (int i = 0; i < (FILTERS * POOLED + 3) / 4; i++) {
    uint64_t mixed = start + (i + 1) * 0x9E3779B97F4A7C15;
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9;
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB;
    random.drawn[i] = mixed ^ mixed >> 31;
  }
  *state = start + (FILTERS * POOLED + 3) / 4 * 0x9E3779B97F4A7C15;
  for (int i = 0; i < FILTERS * POOLED; i++) values[i] *= random.words[i] < least ? 0 : kept;
}

/* images (n, HEIGHT, WIDTH), mean and inverse_std (HEIGHT, WIDTH), weight (FILTERS, TAPS); bias, and what BatchNorm has: gamma,
   beta, running_mean, running_var (all FILTERS, or NULL; epsilon is 0 without it); a value is at least floor, and dropped
   where least > 0 (see drop) → norms (FILTERS); maxima (n, FILTERS, POOLED) before all that follows the convolution, out
   after it; unless NULL: maps (n, FILTERS, MAP) and places (n, FILTERS, POOLED), for `backward`. If is_batch, norms are
   of this batch, and the running statistics take a share of it, momentum. */
int forward(int64_t n, const uint8_t *images, const float *mean, const float *inverse_std, const float *weight,
            const float *bias, const float *gamma, const float *beta, float *running_mean, float *running_var,
            int64_t is_batch, double epsilon, double momentum, double floor, int64_t least, double kept, uint64_t seed,
            norm *norms, float *maxima, float *out, float *maps, uint8_t *places) {
  double moments[2][FILTERS], count = (double)n * OUT_HEIGHT * OUT_WIDTH;
  float scale[FILTERS], shift[FILTERS], lowest = floor;
  for (int f = 0; f < FILTERS; f++) norms[f].sign = gamma && gamma[f] < 0 ? -1 : 1;
  if (convolve_and_pool(n, images, mean, inverse_std, weight, norms, maxima, moments, maps, places)) return 1;
  for (int f = 0; f < FILTERS; f++) {
    norm *this = norms + f;
    double variance = 1, added = bias ? bias[f] : 0;
    this->centre = -this->sign * added;
    if (is_batch) {
      this->centre = moments[0][f];
      variance = moments[1][f] - this->centre * this->centre;
      running_mean[f] += momentum * (this->sign * this->centre + added - running_mean[f]);
      running_var[f] += momentum * (variance * count / (count - 1) - running_var[f]);
    } else if (gamma) {
      this->centre += this->sign * running_mean[f];
      variance = running_var[f];
    }
    this->inverse_std = 1 / sqrt(variance + epsilon);
    this->factor = this->inverse_std * (gamma ? fabs(gamma[f]) : 1);
    scale[f] = this->factor;
    shift[f] = (beta ? beta[f] : 0) - this->centre * this->factor;
  }
  for (int64_t i = 0; i < n; i++, maxima += FILTERS * POOLED, out += FILTERS * POOLED) {
    for (int f = 0; f < FILTERS; f++)
      for (int at = f * POOLED; at < (f + 1) * POOLED; at++) {
        float value = scale[f] * maxima[at] + shift[f];
        out[at] = value > lowest ? value : lowest;
      }
    if (least) drop(out, &seed, least, kept);
  }
  return 0;
}

/* The gradient of a value that was scaled and shifted, from that of out: none where out is at floor or dropped. */
static inline float of_scaled(float out, float of_out, float floor, float kept) {
  return out > floor ? kept * of_out : 0;
}

/* Arguments as in `backward`; of_values: the gradient of a value before pooling is of_values[0] + of_values[1] · value, and
   factor · of_scaled if it is a maximum → of_weight (FILTERS, TAPS). Inlined it would be slower by a fifth (GCC 12). */
__attribute__((noinline))
static int filter_gradient(int64_t n, const uint8_t *images, const float *mean, const float *inverse_std,
                           const norm *norms, const float *maps, const uint8_t *places, const float *out,
                           const float *of_out, float floor, float kept, float of_values[2][FILTERS],
                           float *of_weight) {
  struct {
    vector sums[BLOCKS * BLOCK][TAPS + 1];
    float means[VALUES], factors[VALUES], values[IMAGES][VALUES + ROW], of_maps[IMAGES][BLOCKS * BLOCK * MAP];
    uint8_t planes[VALUES];
  } *own = aligned_alloc(64, (sizeof *own + 63) / 64 * 64);
  if (!own) return 1;
  memset(own, 0, sizeof *own);
  arrange(mean, own->means);
  arrange(inverse_std, own->factors);
  for (int64_t first = 0; first < n; first += IMAGES) {
    int count = n - first < IMAGES ? n - first : IMAGES;
    for (int image = 0; image < count; image++) {
      int64_t i = first + image;
      standardize(images + i * PIXELS, own->planes, own->means, own->factors, own->values[image]);
      for (int f = 0; f < FILTERS; f++) {
        float *of_map = own->of_maps[image] + f * MAP;
        const float *map = maps + (i * FILTERS + f) * MAP;
        for (int y = 0; y < OUT_HEIGHT; y++)
          for (int x = 0; x < OUT_WIDTH; x++)
            of_map[y * ROW + x] = of_values[0][f] + of_values[1][f] * map[y * ROW + x];
        int64_t at = (i * FILTERS + f) * POOLED;
        float of_maxima[POOLED], factor = norms[f].factor;
        for (int k = 0; k < POOLED; k++) of_maxima[k] = factor * of_scaled(out[at + k], of_out[at + k], floor, kept);
        for (int y = 0, k = 0; y < POOLED_HEIGHT; y++)
          for (int x = 0; x < POOLED_WIDTH; x++, k++)
            of_map[(y * POOL + places[at + k] / POOL) * ROW + x * POOL + places[at + k] % POOL] += of_maxima[k];
      }
    }
    for (int block = 0; block < BLOCKS; block++)
      for (int tap = 0; tap < TAPS; tap += 2) { /* the last may be one too many, and is not used */
        int one = place_of(tap / KERNEL, tap % KERNEL);
        int other = tap + 1 < TAPS ? place_of((tap + 1) / KERNEL, (tap + 1) % KERNEL) : one;
        vector sums[2][BLOCK];
        for (int f = 0; f < BLOCK; f++)
          for (int t = 0; t < 2; t++) sums[t][f] = own->sums[block * BLOCK + f][tap + t];
        for (int image = 0; image < count; image++)
#pragma GCC unroll 8
          for (int y = 0; y < OUT_HEIGHT; y++)
            for (int v = 0; v < VECTORS; v++) {
              const float *seen = own->values[image] + y * PHASE_WIDTH + v * LANES;
              vector pixels = *(const loose *)(seen + one), others = *(const loose *)(seen + other);
#pragma GCC unroll 5
              for (int f = 0; f < BLOCK; f++) {
                vector of_map = *(const loose *)(own->of_maps[image] + (block * BLOCK + f) * MAP + y * ROW + v * LANES);
                sums[0][f] += of_map * pixels;
                sums[1][f] += of_map * others;
              }
            }
        for (int f = 0; f < BLOCK; f++)
          for (int t = 0; t < 2; t++) own->sums[block * BLOCK + f][tap + t] = sums[t][f];
      }
  }
  for (int f = 0; f < FILTERS; f++)
    for (int tap = 0; tap < TAPS; tap++) {
      float sum = 0;
      for (int lane = 0; lane < LANES; lane++) sum += own->sums[f][tap][lane];
      of_weight[f * TAPS + tap] = norms[f].sign * sum;
    }
  free(own);
  return 0;
}

/* What `forward` was given and gave; of_out: the gradient of out → those of weight (FILTERS, TAPS), bias, gamma and beta
   (FILTERS). */
int backward(int64_t n, const uint8_t *images, const float *mean, const float *inverse_std,
             int64_t is_batch, double floor, double kept, const norm *norms, const float *maxima, const float *out,
             const float *maps, const uint8_t *places, const float *of_out, float *of_weight, float *of_bias,
             float *of_gamma, float *of_beta) {
  /* At every place of its own: they do not wait for each other. */
  struct {
    double shifts[FILTERS][POOLED], factors[FILTERS][POOLED];
  } *sums = calloc(1, sizeof *sums);
  if (!sums) return 1;
  for (int64_t i = 0, at = 0; i < n; i++)
    for (int f = 0; f < FILTERS; f++)
      for (int place = 0; place < POOLED; place++, at++) {
        float value = of_scaled(out[at], of_out[at], floor, kept);
        sums->shifts[f][place] += value;
        sums->factors[f][place] += value * maxima[at];
      }
  float of_values[2][FILTERS] = {0};
  double count = (double)n * OUT_HEIGHT * OUT_WIDTH;
  for (int f = 0; f < FILTERS; f++) {
    norm this = norms[f];
    double of_shift = 0, of_factor = 0;
    for (int place = 0; place < POOLED; place++) {
      of_shift += sums->shifts[f][place];
      of_factor += sums->factors[f][place];
    }
    of_factor -= this.centre * of_shift;
    of_bias[f] = this.sign * this.factor * of_shift;
    of_gamma[f] = this.sign * this.inverse_std * of_factor;
    of_beta[f] = of_shift;
    if (is_batch) {
      /* Every value has a share of the mean and of the mean square, by which the variance is computed. */
      double of_variance = of_factor * this.factor * this.inverse_std * this.inverse_std / -2;
      of_values[0][f] = (-this.factor * of_shift - 2 * this.centre * of_variance) / count;
      of_values[1][f] = 2 * of_variance / count;
    }
  }
  free(sums);
  return filter_gradient(n, images, mean, inverse_std, norms, maps, places, out, of_out, floor, kept, of_values,
                         of_weight);
}
