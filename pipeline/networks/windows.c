/* A convolution and the max pooling after it, and the gradient of its filters; geometry by macros, from windows.py.

   All that one image needs stays in the cache. Images are grey and come as uint8 planes: pixel (y, x), padding included, is
   in plane (y % STRIDE)·STRIDE + x % STRIDE, at (y / STRIDE, x / STRIDE), so that what a filter's tap sees along a row of
   outputs lies side by side. Sums run in one order, whatever the number of threads.
   Every function returns 0, or 1 if there is no memory. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum {
  LANES = 8,                                     /* floats computed on at once */
  BLOCK = 5,                                     /* filters whose sums stay in registers together */
  TAPS = KERNEL * KERNEL,
  PLANE = PHASE_HEIGHT * PHASE_WIDTH,
  VALUES = STRIDE * STRIDE * PLANE,              /* of an image */
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

/* Where in an image a tap of the filters finds what the first output takes. */
static inline int start_of(int tap) {
  int y = tap / KERNEL, x = tap % KERNEL;
  return (y % STRIDE * STRIDE + x % STRIDE) * PLANE + y / STRIDE * PHASE_WIDTH + x / STRIDE;
}

/* pixels (HEIGHT, WIDTH) → planes (VALUES), the rest of which stays 0, so that padding is 0 when standardized */
static void arrange(const float *pixels, float *planes) {
  for (int y = PADDING; y < HEIGHT + PADDING; y++)
    for (int x = PADDING; x < WIDTH + PADDING; x++)
      planes[(y % STRIDE * STRIDE + x % STRIDE) * PLANE + y / STRIDE * PHASE_WIDTH + x / STRIDE] = *pixels++;
}

static inline void standardize(const uint8_t *image, const float *means, const float *factors, float *restrict values) {
  for (int i = 0; i < VALUES; i++) values[i] = (image[i] - means[i]) * factors[i];
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
        place += (k - place) * is_larger; /* no branch: nobody could guess it */
      }
      maxima[y * POOLED_WIDTH + x] = maximum;
      places[y * POOLED_WIDTH + x] = place;
    }
}

/* images uint8 (n, VALUES), mean and inverse_std (HEIGHT, WIDTH), weight (FILTERS, TAPS) → maxima (n, FILTERS, POOLED); moments (2, FILTERS), 0 before: sums of all values before pooling, and of their squares;
   unless NULL: maps (n, FILTERS, MAP) and places (n, FILTERS, POOLED), for filter_gradient. */
int convolve_and_pool(int64_t n, const uint8_t *images, const float *mean, const float *inverse_std,
                      const float *weight, float *maxima, double *moments, float *maps, uint8_t *places) {
  struct {
    float values[VALUES + ROW] __attribute__((aligned(64))), maps[BLOCKS * BLOCK * MAP] __attribute__((aligned(64)));
    float filters[BLOCKS * TAPS * BLOCK];
    float means[VALUES], factors[VALUES];
    double sums[FILTERS][LANES], squares[FILTERS][LANES];
    uint8_t places[POOLED];
  } *own = aligned_alloc(64, (sizeof *own + 63) / 64 * 64);
  if (!own) return 1;
  memset(own, 0, sizeof *own);
  arrange(mean, own->means);
  arrange(inverse_std, own->factors);
  for (int f = 0; f < FILTERS; f++)
    for (int tap = 0; tap < TAPS; tap++)
      own->filters[(f / BLOCK * TAPS + tap) * BLOCK + f % BLOCK] = weight[f * TAPS + tap];
  for (int64_t i = 0; i < n; i++) {
    standardize(images + i * VALUES, own->means, own->factors, own->values);
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
  for (int f = 0; f < FILTERS; f++)
    for (int lane = 0; lane < LANES; lane++) {
      moments[f] += own->sums[f][lane];
      moments[FILTERS + f] += own->squares[f][lane];
    }
  free(own);
  return 0;
}

/* maxima (n, FILTERS, POOLED), scale and shift (FILTERS) → out: scale · maximum + shift, but at least floor. Unless words
   (n, FILTERS, POOLED) are NULL: then times factor, or 0 where a word is less than least. */
int scale_maxima(int64_t n, const float *restrict maxima, const float *scale, const float *shift, float floor,
                 const int16_t *words, float least, float factor, float *restrict out) {
  for (int64_t row = 0; row < n * FILTERS; row++)
    for (int at = 0; at < POOLED; at++) {
      int64_t i = row * POOLED + at;
      float value = scale[row % FILTERS] * maxima[i] + shift[row % FILTERS];
      out[i] = value > floor ? value : floor;
    }
  if (words)
    for (int64_t i = 0; i < n * FILTERS * POOLED; i++) out[i] *= words[i] < least ? 0 : factor;
  return 0;
}

/* maxima and out as above, of_out: its gradient; what is not above floor has none, the rest is multiplied by factor →
   of_scaled: the gradient of scale · maximum + shift; of_shift and of_scale (both FILTERS), 0 before: its sum, and that
   of its products with the maxima. */
int scale_gradient(int64_t n, const float *restrict maxima, float floor, float factor, const float *restrict out,
                   const float *restrict of_out, float *restrict of_scaled, double *of_shift, double *of_scale) {
  /* At every place of its own: they do not wait for each other. */
  double (*sums)[2][FILTERS][POOLED] = calloc(1, sizeof *sums);
  if (!sums) return 1;
  for (int64_t row = 0; row < n * FILTERS; row++) {
    double *shifts = (*sums)[0][row % FILTERS], *scales = (*sums)[1][row % FILTERS];
    for (int at = 0; at < POOLED; at++) {
      int64_t i = row * POOLED + at;
      float value = out[i] > floor ? factor * of_out[i] : 0;
      of_scaled[i] = value;
      shifts[at] += value;
      scales[at] += value * maxima[i];
    }
  }
  for (int f = 0; f < FILTERS; f++)
    for (int at = 0; at < POOLED; at++) {
      of_shift[f] += (*sums)[0][f][at];
      of_scale[f] += (*sums)[1][f][at];
    }
  free(sums);
  return 0;
}

/* images, mean, inverse_std, maps and places as above; of_scaled (n, FILTERS, POOLED): the gradient of the scaled maxima;
   scale (FILTERS); of_values (2, FILTERS): the gradient of a value before pooling is of_values[0] + of_values[1] · value,
   and scale · of_scaled if it is a maximum → of_weight (FILTERS, TAPS). */
int filter_gradient(int64_t n, const uint8_t *images, const float *mean, const float *inverse_std,
                    const float *maps, const uint8_t *places, const float *of_scaled, const float *scale, const float *of_values,
                    float *of_weight) {
  struct {
    vector sums[BLOCKS * BLOCK][TAPS + 1];
    float means[VALUES], factors[VALUES], values[IMAGES][VALUES + ROW], of_maps[IMAGES][BLOCKS * BLOCK * MAP];
  } *own = aligned_alloc(64, (sizeof *own + 63) / 64 * 64);
  if (!own) return 1;
  memset(own, 0, sizeof *own);
  arrange(mean, own->means);
  arrange(inverse_std, own->factors);
  for (int64_t first = 0; first < n; first += IMAGES) {
    int count = n - first < IMAGES ? n - first : IMAGES;
    for (int image = 0; image < count; image++) {
      int64_t i = first + image;
      standardize(images + i * VALUES, own->means, own->factors, own->values[image]);
      for (int f = 0; f < FILTERS; f++) {
        float *of_map = own->of_maps[image] + f * MAP;
        const float *map = maps + (i * FILTERS + f) * MAP;
        for (int y = 0; y < OUT_HEIGHT; y++)
          for (int x = 0; x < OUT_WIDTH; x++) of_map[y * ROW + x] = of_values[f] + of_values[FILTERS + f] * map[y * ROW + x];
        const float *of_maximum = of_scaled + (i * FILTERS + f) * POOLED;
        const uint8_t *place = places + (i * FILTERS + f) * POOLED;
        for (int y = 0; y < POOLED_HEIGHT; y++)
          for (int x = 0; x < POOLED_WIDTH; x++, place++)
            of_map[(y * POOL + *place / POOL) * ROW + x * POOL + *place % POOL] +=
                scale[f] * *of_maximum++;
      }
    }
    for (int block = 0; block < BLOCKS; block++)
      for (int tap = 0; tap < TAPS; tap += 2) { /* the last may be one too many, and is not used */
        int one = start_of(tap), other = tap + 1 < TAPS ? start_of(tap + 1) : one;
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
      of_weight[f * TAPS + tap] = sum;
    }
  free(own);
  return 0;
}
