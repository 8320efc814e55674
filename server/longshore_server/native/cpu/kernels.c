// One step of a Llama-shaped decoder in float32 on a CPU, as compiled code. It allocates nothing.
//
// Every sum goes over its terms one by one in a fixed order, in fused multiply-adds, with neighbouring
// outputs side by side in a vector. So a row's result depends on its own sequence alone: not on the other
// rows, not on the number of threads, not on how wide the processor's vectors are. Vectors are GCC's and
// clang's own; where the processor's are shorter the compiler cuts them up.

#include <math.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__FMA__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

// Lanes of the processor's own vectors, and of what is summed side by side, which is the same everywhere.
#if defined(__AVX512F__)
#define WIDTH 16
#elif defined(__FMA__)
#define WIDTH 8
#else
#define WIDTH 4
#endif
#define LANES 16
#define PARTS (LANES / WIDTH)

#define PANEL 32                 // columns of a matrix that are stored together
#define MAX_VECTORS 8            // of the columns of a tile
#define ROW_BLOCK 96             // rows whose inputs stay in a core's own cache while a panel is multiplied
#define MAX_GROUP 4              // query heads of one KV head that are computed together
#define WORDS_AHEAD 2048         // how far ahead of its use a weight is fetched
#define LOOKS_BEFORE_YIELD 4000  // some microseconds
#if WIDTH == 16
#define MAX_ROWS 12      // of a tile
#define KEY_TILES 4      // tiles of LANES keys that are scored together
#define VALUE_VECTORS 4  // of a value's numbers that are summed together
#else
#define MAX_ROWS 6
#define KEY_TILES 1
#define VALUE_VECTORS 2
#endif
#define KEY_VECTORS (KEY_TILES * PARTS)
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef uint32_t uvec __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

enum { FLOAT32, BFLOAT16 };          // how weights are stored; both are multiplied as float32
enum { STORE, ADD, SILU_MULTIPLY };  // what becomes of a product

typedef struct {
    const void *panels;  // as pack_matrix() leaves them
    const float *bias;   // [num_out], or null
    int64_t num_in, num_out, kind;
} Matrix;

typedef struct {
    const float *input_norm, *post_norm;  // [hidden]
    const float *q_norm, *k_norm;         // [head_dim], or null
    Matrix qkv, output, gate_up, down;    // gate_up: 16 gates, their 16 ups, the next 16 gates ...
    float *keys;                          // [blocks, kv_heads, head_dim, block_size]
    float *values;                        // [blocks, kv_heads, block_size, head_dim]
    int64_t window;                       // tokens that a row sees, its own counted; 0 means all
    double scale;
} Layer;

typedef struct {
    int64_t num_layers, hidden, inner, num_heads, num_kv_heads, head_dim, block_size;
    double eps, qk_eps;
    const Layer *layers;
    const void *embedding;  // [vocab, hidden]
    int64_t embedding_kind;
    const float *final_norm;  // [hidden]
    Matrix head;
} Model;

typedef struct {
    int64_t num_rows, num_samples, num_threads, max_context;
    const int32_t *tokens;         // [rows]; -1 - n stands for row n of the features
    const int32_t *positions;      // [rows]
    const int32_t *tables;         // [rows]: where in `blocks` the row's sequence begins
    const int32_t *blocks;         // block tables, one behind the other
    const int32_t *samples;        // [samples]: rows whose logits are wanted
    const float *cosines, *sines;  // [positions, head_dim / 2]
    const float *features;         // [image rows, hidden]
    float *scratch;                // as scratch_floats() asks for
    float *logits;                 // [samples, vocab]
    int32_t *best;  // [samples]: each one's likeliest token, -1 where the logits are not finite
} Step;

// --- vectors ---

static const float LANE_NUMBERS[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

INLINE vec load(const float *from) { return *(const vec *)from; }
INLINE void store(float *to, vec x) { *(vec *)to = x; }
INLINE vec splat(float x) { return x - (vec){}; }
INLINE vec choose(ivec mask, vec a, vec b) { return (vec)((mask & (ivec)a) | (~mask & (ivec)b)); }

// a * b + c in one rounding, where the processor can: compilers are not left to decide when.
INLINE vec fused(vec a, vec b, vec c) {
#if defined(__AVX512F__)
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
    return (vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

INLINE float fused_one(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_NEON)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

// All of `from` and zeros behind it.
INLINE vec load_some(const float *from, int64_t count) {
    vec x = {};
    if (count > 0) memcpy(&x, from, (size_t)(count < WIDTH ? count : WIDTH) * sizeof(float));
    return x;
}

INLINE float sum_lanes(const vec parts[PARTS]) {
    float a[LANES];
    memcpy(a, parts, sizeof a);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) a[i] += a[i + width];
    return a[0];
}

INLINE float max_lanes(vec x) {
    float best = x[0];
    for (int i = 1; i < WIDTH; i++) best = x[i] > best ? x[i] : best;
    return best;
}

// e to the x, within two units of the last place; 0 below -87, finite above 88. NaN stays NaN.
INLINE vec exponential(vec x) {
    const ivec is_tiny = x < splat(-87.0f);
    x = choose(x > splat(88.0f), splat(88.0f), x);
    const vec magic = splat(12582912.0f);  // 1.5 * 2^23: a sum with it has no room for fractions
    const vec shifted = fused(x, splat(1.44269504f), magic), n = shifted - magic;
    const vec r = fused(n, splat(2.12194440e-4f), fused(n, splat(-0.693359375f), x));
    vec p = fused(splat(1.0f / 5040.0f), r, splat(1.0f / 720.0f));
    p = fused(p, r, splat(1.0f / 120.0f));
    p = fused(p, r, splat(1.0f / 24.0f));
    p = fused(p, r, splat(1.0f / 6.0f));
    p = fused(p, r, splat(0.5f));
    p = fused(p, r, splat(1.0f));
    p = fused(p, r, splat(1.0f));
    const ivec power = ((ivec)shifted - (ivec)magic) << 23;
    return choose(is_tiny, splat(0.0f), (vec)((ivec)p + power));
}

INLINE vec silu(vec x) { return x / (exponential(-x) + 1.0f); }

// --- matrix products ---

static int64_t panel_rows(int64_t num_in, int64_t kind) {
    return kind == BFLOAT16 ? (num_in + 1) / 2 : num_in;
}

// Words of 32 bits that pack_matrix() fills.
int64_t packed_words(int64_t num_out, int64_t num_in, int64_t kind) {
    return (num_out + PANEL - 1) / PANEL * panel_rows(num_in, kind) * PANEL;
}

static uint32_t weight_bits(const float *weight, int64_t num_in, int64_t in) {
    uint32_t bits = 0;
    if (in < num_in) memcpy(&bits, weight + in, sizeof bits);
    return bits;
}

// Row-major float32 [num_out, num_in] to panels of 32 columns, zeros where there are fewer. `order`[num_out]
// says which row becomes which column. In bfloat16 a word holds a column's weights of two inputs, the first
// one low.
void pack_matrix(const float *weight, const int32_t *order, int64_t num_out, int64_t num_in, int64_t kind,
                 uint32_t *packed) {
    const int64_t rows = panel_rows(num_in, kind);
    memset(packed, 0, (size_t)packed_words(num_out, num_in, kind) * sizeof *packed);
    for (int64_t column = 0; column < num_out; column++) {
        const float *from = weight + order[column] * num_in;
        uint32_t *to = packed + column / PANEL * rows * PANEL + column % PANEL;
        for (int64_t row = 0; row < rows; row++)
            to[row * PANEL] = kind == BFLOAT16 ? weight_bits(from, num_in, 2 * row) >> 16 |
                                                     (weight_bits(from, num_in, 2 * row + 1) & 0xffff0000u)
                                               : weight_bits(from, num_in, row);
    }
}

// Where column `column` of a matrix begins.
INLINE const uint32_t *column_words(const uint32_t *packed, int64_t column, int64_t panel_words) {
    return packed + column / PANEL * panel_words + column % PANEL;
}

// One input of `rows` rows times `vectors` vectors of columns: the inner loop of everything.
INLINE void multiply_input(const int rows, const int vectors, const float *const in[4], int64_t in_stride,
                           int64_t k, const vec *weights, vec sums[MAX_ROWS][MAX_VECTORS]) {
#pragma GCC unroll 12
    for (int m = 0; m < rows; m++) {
        const vec x = splat(in[m / 3][m % 3 * in_stride + k]);
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) sums[m][v] = fused(x, weights[v], sums[m][v]);
    }
}

// A tile: `rows` rows times `vectors` vectors of columns from where `packed` points.
INLINE void tile(const int rows, const int vectors, const int kind, const uint32_t *packed, int64_t num_in,
                 const float *in, int64_t in_stride, float *out, int64_t out_stride) {
    const int64_t panel_words = panel_rows(num_in, kind) * PANEL;
    const float *starts[4] = {in, in + 3 * in_stride, in + 6 * in_stride, in + 9 * in_stride};
    vec sums[MAX_ROWS][MAX_VECTORS], weights[MAX_VECTORS], odd[MAX_VECTORS];
#pragma GCC unroll 12
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) sums[m][v] = (vec){};
    const int64_t steps = kind == BFLOAT16 ? num_in / 2 : num_in;
    for (int64_t k = 0; k < steps; k++) {
        const uint32_t *from = packed + k * PANEL;
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) {
            const uint32_t *at = column_words(from, v * WIDTH, panel_words);
            const uvec word = *(const uvec *)at;
            if (v * WIDTH % LANES == 0) __builtin_prefetch(at + WORDS_AHEAD);
            weights[v] = (vec)(kind == BFLOAT16 ? word << 16 : word);
            odd[v] = (vec)(word & 0xffff0000u);
        }
        multiply_input(rows, vectors, starts, in_stride, 0, weights, sums);
        if (kind == BFLOAT16) multiply_input(rows, vectors, starts, in_stride, 1, odd, sums);
        for (int i = 0; i < 4; i++) starts[i] += kind == BFLOAT16 ? 2 : 1;
    }
    if (kind == BFLOAT16 && num_in % 2) {
        const uint32_t *from = packed + steps * PANEL;
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++)
            weights[v] = (vec)(*(const uvec *)column_words(from, v * WIDTH, panel_words) << 16);
        multiply_input(rows, vectors, starts, in_stride, 0, weights, sums);
    }
#pragma GCC unroll 12
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) store(out + m * out_stride + v * WIDTH, sums[m][v]);
}

typedef void RunTile(const uint32_t *, int64_t, const float *, int64_t, float *, int64_t);

typedef struct {
    int64_t columns;
    RunTile *run[2];  // by how weights are stored
} Tile;

#define TILE_OF(rows, vectors, kind)                                                                         \
    static void tile_##rows##_##vectors##_##kind(const uint32_t *packed, int64_t num_in, const float *in,    \
                                                 int64_t in_stride, float *out, int64_t out_stride) {        \
        tile(rows, vectors, kind, packed, num_in, in, in_stride, out, out_stride);                           \
    }
#define TILE(rows, vectors) TILE_OF(rows, vectors, FLOAT32) TILE_OF(rows, vectors, BFLOAT16)
#define RUN(rows, vectors, kind) tile_##rows##_##vectors##_##kind
#define ENTRY(rows, vectors) {vectors * WIDTH, {RUN(rows, vectors, FLOAT32), RUN(rows, vectors, BFLOAT16)}}

// By number of rows: tiles of at most a panel, and for a single row of tiles those with as many columns as
// keep the processor busy, so that no sum waits for the one before it.
#if WIDTH == 16
TILE(1, 2) TILE(2, 2) TILE(3, 2) TILE(4, 2) TILE(5, 2) TILE(6, 2)
TILE(7, 2) TILE(8, 2) TILE(9, 2) TILE(10, 2) TILE(11, 2) TILE(12, 2)
TILE(1, 8) TILE(2, 8) TILE(3, 6) TILE(4, 4) TILE(5, 4) TILE(6, 4)
static const Tile NARROW[MAX_ROWS] = {
    ENTRY(1, 2), ENTRY(2, 2), ENTRY(3, 2), ENTRY(4, 2),  ENTRY(5, 2),  ENTRY(6, 2),
    ENTRY(7, 2), ENTRY(8, 2), ENTRY(9, 2), ENTRY(10, 2), ENTRY(11, 2), ENTRY(12, 2),
};
static const Tile WIDE[MAX_ROWS] = {
    ENTRY(1, 8), ENTRY(2, 8), ENTRY(3, 6), ENTRY(4, 4),  ENTRY(5, 4),  ENTRY(6, 4),
    ENTRY(7, 2), ENTRY(8, 2), ENTRY(9, 2), ENTRY(10, 2), ENTRY(11, 2), ENTRY(12, 2),
};
#else
TILE(1, 4) TILE(2, 4) TILE(3, 4) TILE(4, 2) TILE(5, 2) TILE(6, 2) TILE(1, 8)
static const Tile NARROW[MAX_ROWS] = {
    ENTRY(1, 4), ENTRY(2, 4), ENTRY(3, 4), ENTRY(4, 2), ENTRY(5, 2), ENTRY(6, 2),
};
static const Tile WIDE[MAX_ROWS] = {
    ENTRY(1, 8), ENTRY(2, 4), ENTRY(3, 4), ENTRY(4, 2), ENTRY(5, 2), ENTRY(6, 2),
};
#endif
#define MAX_COLUMNS (MAX_VECTORS * LANES)  // of the sums that are finished together

INLINE void put(float *out, vec x, int64_t count, int mode) {
    if (count >= WIDTH) {
        if (mode == ADD) x = load(out) + x;
        store(out, x);
        return;
    }
    for (int64_t i = 0; i < count; i++) out[i] = mode == ADD ? out[i] + x[i] : x[i];
}

// Bias, then what `mode` says, for one row's sums of `count` columns from `column` on.
static void finish(const Matrix *matrix, float *sums, int64_t count, int64_t column, float *row, int mode) {
    const int64_t left = matrix->num_out - column;
    if (count > left) count = left;
    if (matrix->bias)
        for (int64_t i = 0; i < count; i++) sums[i] += matrix->bias[column + i];
    if (mode != SILU_MULTIPLY) {
        for (int64_t i = 0; i < count; i += WIDTH) put(row + column + i, load(sums + i), count - i, mode);
        return;
    }
    for (int64_t i = 0; i < count; i += 2 * LANES)
        for (int64_t j = i; j < i + LANES; j += WIDTH)
            store(row + (column + i) / 2 + j - i, silu(load(sums + j)) * load(sums + j + LANES));
}

// `rows` rows times `columns` columns from `column` on, which is where a panel begins.
static void multiply_columns(const Tile *shape, int64_t rows, int64_t columns, const Matrix *matrix,
                             int64_t column, const float *in, int64_t in_stride, float *out,
                             int64_t out_stride, int mode) {
    float sums[MAX_ROWS * MAX_COLUMNS] __attribute__((aligned(64)));
    const int64_t panel_words = panel_rows(matrix->num_in, matrix->kind) * PANEL;
    for (int64_t done = 0; done < columns; done += shape->columns)
        shape->run[matrix->kind](column_words(matrix->panels, column + done, panel_words), matrix->num_in, in,
                                 in_stride, sums + done, columns);
    for (int64_t m = 0; m < rows; m++)
        finish(matrix, sums + m * columns, columns, column, out + m * out_stride, mode);
}

// [rows, num_in] times the matrix, this thread's share of the columns.
static void multiply(const Matrix *matrix, const float *in, int64_t in_stride, float *out, int64_t out_stride,
                     int64_t num_rows, int mode, int thread, int num_threads) {
    const int64_t panels = (matrix->num_out + PANEL - 1) / PANEL;
    const int64_t begin = panels * thread / num_threads * PANEL,
                  end = panels * (thread + 1) / num_threads * PANEL;
    for (int64_t first = 0; first < num_rows; first += ROW_BLOCK) {
        const int64_t rows = num_rows - first < ROW_BLOCK ? num_rows - first : ROW_BLOCK;
        const int64_t tiles = (rows + MAX_ROWS - 1) / MAX_ROWS;
        const float *block_in = in + first * in_stride;
        float *block_out = out + first * out_stride;
        int64_t column = begin;
        if (tiles == 1) {
            const Tile *shape = WIDE + rows - 1;
            const int64_t columns = shape->columns > PANEL ? shape->columns : PANEL;
            for (; column + columns <= end; column += columns)
                multiply_columns(shape, rows, columns, matrix, column, block_in, in_stride, block_out,
                                 out_stride, mode);
        }
        for (; column < end; column += PANEL)
            for (int64_t i = 0; i < tiles; i++) {  // of nearly equal height
                const int64_t row = rows * i / tiles, height = rows * (i + 1) / tiles - row;
                multiply_columns(NARROW + height - 1, height, PANEL, matrix, column,
                                 block_in + row * in_stride, in_stride, block_out + row * out_stride,
                                 out_stride, mode);
            }
    }
}

// --- rows ---

static void normalize(const float *in, const float *weight, float *out, int64_t size, float eps) {
    vec squares[PARTS] = {};
    for (int64_t i = 0; i < size; i += LANES)
        for (int part = 0; part < PARTS; part++) {
            const int64_t at = i + part * WIDTH;
            const vec x = at + WIDTH <= size ? load(in + at) : load_some(in + at, size - at);
            squares[part] = fused(x, x, squares[part]);
        }
    const float factor = 1.0f / sqrtf(sum_lanes(squares) / (float)size + eps);
    for (int64_t i = 0; i < size; i++) out[i] = in[i] * factor * weight[i];
}

static void rotate(float *head, const float *cosines, const float *sines, int64_t half) {
    for (int64_t i = 0; i < half; i++) {
        const float lower = head[i], upper = head[i + half];
        head[i] = fused_one(lower, cosines[i], -(upper * sines[i]));
        head[i + half] = fused_one(upper, cosines[i], lower * sines[i]);
    }
}

static void embed(const Model *model, const Step *step, int32_t token, float *row) {
    const int64_t hidden = model->hidden;
    if (token < 0) {
        memcpy(row, step->features + (-1 - (int64_t)token) * hidden, (size_t)hidden * sizeof *row);
        return;
    }
    if (model->embedding_kind == FLOAT32) {
        memcpy(row, (const float *)model->embedding + token * hidden, (size_t)hidden * sizeof *row);
        return;
    }
    const uint16_t *from = (const uint16_t *)model->embedding + token * hidden;
    for (int64_t i = 0; i < hidden; i++) {
        const uint32_t bits = (uint32_t)from[i] << 16;
        memcpy(row + i, &bits, sizeof bits);
    }
}

// Norms and rotates the row's query and key heads, and puts key and value into their places in the cache.
static void place_row(const Model *model, const Layer *layer, const Step *step, int64_t row, float *qkv) {
    const int64_t dim = model->head_dim, heads = model->num_heads, kv_heads = model->num_kv_heads;
    const int64_t size = model->block_size, position = step->positions[row];
    const float *cosines = step->cosines + position * (dim / 2), *sines = step->sines + position * (dim / 2);
    for (int64_t head = 0; head < heads + kv_heads; head++) {
        const float *norm = head < heads ? layer->q_norm : layer->k_norm;
        if (norm) normalize(qkv + head * dim, norm, qkv + head * dim, dim, (float)model->qk_eps);
        rotate(qkv + head * dim, cosines, sines, dim / 2);
    }
    const int64_t block = step->blocks[step->tables[row] + position / size], offset = position % size;
    for (int64_t head = 0; head < kv_heads; head++) {
        const float *key = qkv + (heads + head) * dim, *value = key + kv_heads * dim;
        float *keys = layer->keys + (block * kv_heads + head) * dim * size + offset;
        for (int64_t i = 0; i < dim; i++) keys[i * size] = key[i];
        memcpy(layer->values + ((block * kv_heads + head) * size + offset) * dim, value,
               (size_t)dim * sizeof *value);
    }
}

// --- attention ---

typedef struct {
    const float *keys, *values;  // of one KV head; `block_floats` from block to block
    int64_t block_floats, block_size, dim;
    const int32_t *blocks;
    int64_t begin, end;  // the tokens that are seen
    float scale;
} Context;

// The keys of LANES tokens from `token` on as [dim, LANES]; gathered where blocks do not hold them together.
INLINE const float *key_tile(const Context *context, int64_t token, float *gathered, int64_t *stride) {
    const int64_t size = context->block_size, dim = context->dim;
    if (size % LANES == 0) {
        *stride = size;
        return context->keys + context->blocks[token / size] * context->block_floats + token % size;
    }
    *stride = LANES;
    for (int64_t lane = 0; lane < LANES; lane++) {
        const int64_t from = token + lane < context->end ? token + lane : context->end - 1;
        const float *keys =
            context->keys + context->blocks[from / size] * context->block_floats + from % size;
        for (int64_t i = 0; i < dim; i++) gathered[i * LANES + lane] = keys[i * size];
    }
    return gathered;
}

// What to fetch while the tiles before are scored: the keys of `token`, or behind the last of them the first
// values.
INLINE const float *tile_ahead(const Context *context, int64_t token) {
    const int64_t size = context->block_size, past = token - context->end;
    const int64_t first = past < context->end - context->begin ? context->begin + past : context->begin;
    if (past < 0) return context->keys + context->blocks[token / size] * context->block_floats + token % size;
    return context->values + context->blocks[first / size] * context->block_floats;
}

// Scaled scores of `group` query heads with `tiles` tiles of keys; minus infinity outside of the context.
INLINE void score_tiles(const int group, const int tiles, const Context *context, const float *queries,
                        int64_t token, float *gathered, float *scores, int64_t score_stride) {
    vec sums[MAX_GROUP][KEY_VECTORS];
    const float *keys[KEY_TILES], *ahead[KEY_TILES];
    const int64_t dim = context->dim;
    const int vectors = tiles * PARTS;
    int64_t stride = LANES;
    for (int t = 0; t < tiles; t++) {
        keys[t] = key_tile(context, token + t * LANES, gathered + t * dim * LANES, &stride);
        ahead[t] = tile_ahead(context, token + (tiles + t) * LANES);
    }
#pragma GCC unroll 4
    for (int g = 0; g < group; g++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) sums[g][v] = (vec){};
    for (int64_t i = 0; i < dim; i++) {
        vec key[KEY_VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) key[v] = load(keys[v / PARTS] + i * stride + v % PARTS * WIDTH);
#pragma GCC unroll 4
        for (int t = 0; t < tiles; t++) __builtin_prefetch(ahead[t] + i * stride);
#pragma GCC unroll 4
        for (int g = 0; g < group; g++) {
            const vec query = splat(queries[g * dim + i]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) sums[g][v] = fused(query, key[v], sums[g][v]);
        }
    }
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) {
        const vec tokens = load(LANE_NUMBERS) + (float)(token + v * WIDTH);
        const ivec seen = (tokens >= splat((float)context->begin)) & (tokens < splat((float)context->end));
#pragma GCC unroll 4
        for (int g = 0; g < group; g++)
            store(scores + g * score_stride + v * WIDTH,
                  choose(seen, sums[g][v] * context->scale, splat(-INFINITY)));
    }
}

// Scores to weights that are not divided by their sum yet, which is returned. `count` is a multiple of LANES.
static float soften(float *scores, int64_t count) {
    vec best = load(scores), sums[PARTS] = {};
    for (int64_t i = WIDTH; i < count; i += WIDTH) {
        const vec x = load(scores + i);
        best = choose(x > best, x, best);
    }
    const vec largest = splat(max_lanes(best));
    for (int64_t i = 0; i < count; i += LANES)
        for (int part = 0; part < PARTS; part++) {
            float *at = scores + i + part * WIDTH;
            const vec weight = exponential(load(at) - largest);
            sums[part] += weight;
            store(at, weight);
        }
    return sum_lanes(sums);
}

// Weighted sums of `vectors` vectors of the values' numbers, from `first` on.
INLINE void mix_values(const int group, const int vectors, const Context *context, const float *weights,
                       int64_t weight_stride, int64_t first, const float *sums, float *out) {
    vec totals[MAX_GROUP][VALUE_VECTORS];
    const int64_t size = context->block_size, dim = context->dim;
#pragma GCC unroll 4
    for (int g = 0; g < group; g++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) totals[g][v] = (vec){};
    for (int64_t token = context->begin; token < context->end;) {
        const int64_t end_of_block = (token / size + 1) * size;
        const int64_t stop = end_of_block < context->end ? end_of_block : context->end;
        const int64_t next = stop < context->end ? stop / size : token / size;
        const float *values = context->values + context->blocks[token / size] * context->block_floats + first;
        const float *ahead = context->values + context->blocks[next] * context->block_floats + first;
        for (; token < stop; token++) {
            const int64_t at = token % size * dim;
            vec part[VALUE_VECTORS];
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) {
                part[v] = load(values + at + v * WIDTH);
                if (v * WIDTH % LANES == 0) __builtin_prefetch(ahead + at + v * WIDTH);
            }
#pragma GCC unroll 4
            for (int g = 0; g < group; g++) {
                const vec weight = splat(weights[g * weight_stride + token]);
#pragma GCC unroll 4
                for (int v = 0; v < vectors; v++) totals[g][v] = fused(weight, part[v], totals[g][v]);
            }
        }
    }
#pragma GCC unroll 4
    for (int g = 0; g < group; g++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) store(out + g * dim + first + v * WIDTH, totals[g][v] / sums[g]);
}

static void mix_dimension(int group, const Context *context, const float *weights, int64_t weight_stride,
                          int64_t i, const float *sums, float *out) {
    const int64_t size = context->block_size, dim = context->dim;
    for (int g = 0; g < group; g++) {
        float total = 0.0f;
        for (int64_t token = context->begin; token < context->end; token++) {
            const float *values = context->values + context->blocks[token / size] * context->block_floats;
            total = fused_one(weights[g * weight_stride + token], values[token % size * dim + i], total);
        }
        out[g * dim + i] = total / sums[g];
    }
}

INLINE void attend_group(const int group, const Context *context, const float *queries, float *out,
                         float *scores, int64_t score_stride, float *gathered) {
    const int64_t first = context->begin / LANES * LANES;  // vectors start where they do in every context
    const int64_t count = (context->end - first + LANES - 1) / LANES * LANES;
    float sums[MAX_GROUP];
    int64_t done = 0, i = 0;
    for (; done + KEY_TILES * LANES <= count; done += KEY_TILES * LANES)
        score_tiles(group, KEY_TILES, context, queries, first + done, gathered, scores + done, score_stride);
    for (; done < count; done += LANES)
        score_tiles(group, 1, context, queries, first + done, gathered, scores + done, score_stride);
    for (int g = 0; g < group; g++) sums[g] = soften(scores + g * score_stride, count);
    const float *weights = scores - first;
    for (; i + VALUE_VECTORS * WIDTH <= context->dim; i += VALUE_VECTORS * WIDTH)
        mix_values(group, VALUE_VECTORS, context, weights, score_stride, i, sums, out);
    for (; i + WIDTH <= context->dim; i += WIDTH)
        mix_values(group, 1, context, weights, score_stride, i, sums, out);
    for (; i < context->dim; i++) mix_dimension(group, context, weights, score_stride, i, sums, out);
}

#define ATTEND(group)                                                                                        \
    static void attend_##group(const Context *context, const float *queries, float *out, float *scores,      \
                               int64_t score_stride, float *gathered) {                                      \
        attend_group(group, context, queries, out, scores, score_stride, gathered);                          \
    }
ATTEND(1) ATTEND(2) ATTEND(3) ATTEND(4)
typedef void Attend(const Context *, const float *, float *, float *, int64_t, float *);
static Attend *const ATTEND_GROUP[MAX_GROUP] = {attend_1, attend_2, attend_3, attend_4};

// One row's query heads of one KV head.
static void attend(const Model *model, const Layer *layer, const Step *step, int64_t row, int64_t kv_head,
                   const float *qkv, float *out, float *scratch) {
    const int64_t dim = model->head_dim, group = model->num_heads / model->num_kv_heads,
                  size = model->block_size;
    const int64_t end = step->positions[row] + 1;
    const Context context = {
        .keys = layer->keys + kv_head * dim * size,
        .values = layer->values + kv_head * dim * size,
        .block_floats = model->num_kv_heads * dim * size,
        .block_size = size,
        .dim = dim,
        .blocks = step->blocks + step->tables[row],
        .begin = layer->window && end > layer->window ? end - layer->window : 0,
        .end = end,
        .scale = (float)layer->scale,
    };
    const int64_t score_stride = (step->max_context + 2 * LANES) / LANES * LANES;
    float *gathered = scratch + MAX_GROUP * score_stride;
    for (int64_t g = 0; g < group; g += MAX_GROUP) {
        const int64_t count = group - g < MAX_GROUP ? group - g : MAX_GROUP, head = kv_head * group + g;
        ATTEND_GROUP[count - 1](&context, qkv + head * dim, out + head * dim, scratch, score_stride,
                                gathered);
    }
}

// --- the step ---

typedef struct {
    int arrived, round;
} Meeting;

typedef struct {
    Meeting *meeting;
    float *x;     // [rows, hidden]: the residual
    float *rows;  // [rows, row_stride]: inputs of a product
    float *wide;  // [rows, heads + 2 kv_heads, head_dim], later [rows, row_stride]
    float *thread_scratch;
    int64_t row_stride, qkv_size, thread_floats;
} Buffers;

static int64_t row_stride(const Model *model) {
    const int64_t attended = model->num_heads * model->head_dim;
    int64_t widest = model->hidden > model->inner ? model->hidden : model->inner;
    if (attended > widest) widest = attended;
    return (widest + 15) / 16 * 16 + 16;  // not a power of two, whose rows would compete for cache lines
}

static Buffers place_buffers(const Model *model, const Step *step) {
    Buffers buffers = {.row_stride = row_stride(model),
                       .qkv_size = (model->num_heads + 2 * model->num_kv_heads) * model->head_dim};
    buffers.thread_floats =
        MAX_GROUP * (step->max_context + 2 * LANES) + KEY_TILES * LANES * model->head_dim + LANES;
    buffers.x = step->scratch;
    buffers.rows = buffers.x + step->num_rows * model->hidden;
    buffers.wide = buffers.rows + step->num_rows * buffers.row_stride;
    const int64_t widest = buffers.qkv_size > buffers.row_stride ? buffers.qkv_size : buffers.row_stride;
    buffers.thread_scratch = buffers.wide + step->num_rows * widest;
    return buffers;
}

// How many floats `scratch` must have.
int64_t scratch_floats(const Model *model, const Step *step) {
    const Buffers buffers = place_buffers(model, step);
    return (buffers.thread_scratch - buffers.x) + step->num_threads * buffers.thread_floats;
}

// Waits until all threads are here. After a short while it gives way: the one that is late may need this
// processor.
static void meet(Meeting *meeting, int num_threads) {
    if (num_threads == 1) return;
    const int round = __atomic_load_n(&meeting->round, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&meeting->arrived, 1, __ATOMIC_ACQ_REL) == num_threads) {
        __atomic_store_n(&meeting->arrived, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&meeting->round, round + 1, __ATOMIC_RELEASE);
        return;
    }
    for (int looks = 0; __atomic_load_n(&meeting->round, __ATOMIC_ACQUIRE) == round; looks++)
        if (looks >= LOOKS_BEFORE_YIELD) sched_yield();
}

static void normalize_rows(const Model *model, const Buffers *buffers, const float *weight, int64_t num_rows,
                           int thread, int num_threads) {
    for (int64_t row = thread; row < num_rows; row += num_threads)
        normalize(buffers->x + row * model->hidden, weight, buffers->rows + row * buffers->row_stride,
                  model->hidden, (float)model->eps);
}

// The rows that go on behind the last layer's keys and values: those that are sampled, moved to the front.
static void keep_samples(const Model *model, const Step *step, const Buffers *buffers) {
    for (int64_t i = 0; i < step->num_samples; i++)
        if (step->samples[i] != i)
            memcpy(buffers->x + i * model->hidden, buffers->x + step->samples[i] * model->hidden,
                   (size_t)model->hidden * sizeof(float));
}

static void run_layer(const Model *model, const Step *step, const Buffers *buffers, const Layer *layer,
                      int is_last, int thread, int num_threads) {
    const int64_t stride = buffers->row_stride, hidden = model->hidden;
    int64_t num_rows = step->num_rows;
    normalize_rows(model, buffers, layer->input_norm, num_rows, thread, num_threads);
    meet(buffers->meeting, num_threads);
    multiply(&layer->qkv, buffers->rows, stride, buffers->wide, buffers->qkv_size, num_rows, STORE, thread,
             num_threads);
    meet(buffers->meeting, num_threads);
    for (int64_t row = thread; row < num_rows; row += num_threads)
        place_row(model, layer, step, row, buffers->wide + row * buffers->qkv_size);
    if (is_last) {
        num_rows = step->num_samples;
        if (thread == 0) keep_samples(model, step, buffers);
    }
    meet(buffers->meeting, num_threads);
    for (int64_t item = thread; item < num_rows * model->num_kv_heads; item += num_threads) {
        const int64_t place = item / model->num_kv_heads, row = is_last ? step->samples[place] : place;
        attend(model, layer, step, row, item % model->num_kv_heads, buffers->wide + row * buffers->qkv_size,
               buffers->rows + place * stride, buffers->thread_scratch + thread * buffers->thread_floats);
    }
    meet(buffers->meeting, num_threads);
    multiply(&layer->output, buffers->rows, stride, buffers->x, hidden, num_rows, ADD, thread, num_threads);
    meet(buffers->meeting, num_threads);
    normalize_rows(model, buffers, layer->post_norm, num_rows, thread, num_threads);
    meet(buffers->meeting, num_threads);
    multiply(&layer->gate_up, buffers->rows, stride, buffers->wide, stride, num_rows, SILU_MULTIPLY, thread,
             num_threads);
    meet(buffers->meeting, num_threads);
    multiply(&layer->down, buffers->wide, stride, buffers->x, hidden, num_rows, ADD, thread, num_threads);
    meet(buffers->meeting, num_threads);
}

// The first of the largest numbers; -1 where one is NaN or the largest is infinite.
static int32_t best_place(const float *numbers, int64_t count) {
    vec best = splat(-INFINITY);
    ivec is_nan = {};
    int64_t i = 0;
    for (; i < count; i += WIDTH) {
        vec x = splat(-INFINITY);
        if (i + WIDTH <= count)
            x = load(numbers + i);
        else
            memcpy(&x, numbers + i, (size_t)(count - i) * sizeof *numbers);
        is_nan |= x != x;
        best = choose(x > best, x, best);
    }
    const float largest = max_lanes(best);
    int found_nan = 0;
    for (int lane = 0; lane < WIDTH; lane++) found_nan |= is_nan[lane];
    if (found_nan || largest == INFINITY || largest == -INFINITY) return -1;
    for (i = 0; numbers[i] != largest;) i++;
    return (int32_t)i;
}

static void run_thread(const Model *model, const Step *step, const Buffers *buffers, int thread,
                       int num_threads) {
    for (int64_t row = thread; row < step->num_rows; row += num_threads)
        embed(model, step, step->tokens[row], buffers->x + row * model->hidden);
    meet(buffers->meeting, num_threads);
    for (int64_t i = 0; i < model->num_layers; i++)
        run_layer(model, step, buffers, model->layers + i, i == model->num_layers - 1, thread, num_threads);
    normalize_rows(model, buffers, model->final_norm, step->num_samples, thread, num_threads);
    meet(buffers->meeting, num_threads);
    multiply(&model->head, buffers->rows, buffers->row_stride, step->logits, model->head.num_out,
             step->num_samples, STORE, thread, num_threads);
    meet(buffers->meeting, num_threads);
    for (int64_t i = thread; i < step->num_samples; i += num_threads)
        step->best[i] = best_place(step->logits + i * model->head.num_out, model->head.num_out);
}

// Computes the rows' keys and values and the samples' logits. A sequence's rows stand in order of position.
void run_step(const Model *model, const Step *step) {
    Meeting meeting = {0, 0};
    Buffers buffers = place_buffers(model, step);
    buffers.meeting = &meeting;
#ifdef _OPENMP
#pragma omp parallel num_threads((int)step->num_threads)
    run_thread(model, step, &buffers, omp_get_thread_num(), omp_get_num_threads());
#else
    run_thread(model, step, &buffers, 0, 1);
#endif
}

// [rows, num_in] times one matrix, on one thread.
void multiply_rows(const Matrix *matrix, const float *in, float *out, int64_t num_rows) {
    multiply(matrix, in, matrix->num_in, out, matrix->num_out, num_rows, STORE, 0, 1);
}
