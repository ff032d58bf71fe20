"""Source of the two GPU kernels that compute the statistics of a pass, the same text for Metal and CUDA."""

TILE_ROWS, TILE_THREADS = 256, 512  # more threads a group leave room for one group alone on a multiprocessor
KERNEL_HEADER = {
    "cuda": """
#define FUNCTION __device__ inline
#define DEVICE
#define SHARED __shared__
#define COUNTER unsigned int
#define ADD(counter, value) atomicAdd(&(counter), (unsigned int)(value))
#define SET(counter, value) (counter) = (value)
#define GET(counter) (counter)
#define BARRIER __syncthreads()
#define THREAD ((int)threadIdx.x)
#define GROUP ((int)blockIdx.x)
#define AS_FLOAT(bits) __int_as_float(bits)
#define AS_INT(value) __float_as_int(value)
#define SHUFFLED(value, mask) __shfl_xor_sync(0xffffffffu, value, mask)
""",
    "metal": """
#define FUNCTION inline
#define DEVICE device
#define SHARED threadgroup
#define COUNTER atomic_uint
#define ADD(counter, value) atomic_fetch_add_explicit(&(counter), (uint)(value), memory_order_relaxed)
#define SET(counter, value) atomic_store_explicit(&(counter), (uint)(value), memory_order_relaxed)
#define GET(counter) atomic_load_explicit(&(counter), memory_order_relaxed)
#define BARRIER threadgroup_barrier(mem_flags::mem_threadgroup)
#define THREAD ((int)thread_position_in_threadgroup.x)
#define GROUP ((int)threadgroup_position_in_grid.x)
#define AS_FLOAT(bits) as_type<float>(bits)
#define AS_INT(value) as_type<int>(value)
#define SHUFFLED(value, mask) simd_shuffle_xor(value, (ushort)(mask))
""",
}
KERNEL_FUNCTIONS = """
#define COPY 257
FUNCTION float power_of_two(int exponent) { return AS_FLOAT((exponent + 127) << 23); }

// calibration_store.histograms.histogram_grid: the finest power-of-two width at which [low, high] touches at most 256
// bins
FUNCTION int grid_exponent(float low, float high) {
    int exponent = ((AS_INT(high - low) >> 23) & 255) - 127 - 9;
    if (exponent < -24) exponent = -24;
    while (floor(high * power_of_two(-exponent)) - floor(low * power_of_two(-exponent)) > 255.0f) exponent++;
    return exponent;
}

// the smallest, and the largest, value of the 32 threads that run side by side
FUNCTION float lane_min(float value) {
    for (int mask = 16; mask > 0; mask /= 2) {
        const float other = SHUFFLED(value, mask);
        value = other < value ? other : value;
    }
    return value;
}
FUNCTION float lane_max(float value) {
    for (int mask = 16; mask > 0; mask /= 2) {
        const float other = SHUFFLED(value, mask);
        value = other > value ? other : value;
    }
    return value;
}

FUNCTION bool is_finite(float value) { return (AS_INT(value) & 0x7f800000) != 0x7f800000; }
"""


# plan (inputs, 5) int32 holds for each input: the index of its first group, its rows, its channels, the offset of its
# part of tile_limits, and the offset of its part of limits and moments.
#
# One group of TILE_THREADS threads takes a tile, 256 channels × TILE_ROWS rows of one input, two rows at a time. The group
# reads the tile for its limits, and once more for the histogram over the tile's own grid. The second reading hits the
# cache, so x is read from memory once. Neighbouring threads count in different copies of the histogram, which begin in
# different banks of the memory (COPY), so that equal values seldom wait for each other.
#
# tile_limits: minimum, maximum, sum and sum of squares of each channel in each row of tiles, (4, channels) float32.
# tile_histograms (groups, 259) int32: 256 counts, the grid's exponent, its first bin, the number of values that are not
# finite.
TILE_KERNEL = """
    // Metal adds the attributes whose names stand here: thread_position_in_threadgroup, threadgroup_position_in_grid.
    const int rows = plan[input * 5 + 1], channels = plan[input * 5 + 2];
    const int columns = (channels + 255) / 256, tile = GROUP - plan[input * 5];
    const int tile_row = tile / columns, channel = tile % columns * 256 + THREAD % 256;
    const int first_row = tile_row * TILE_ROWS + THREAD / 256;
    const int end_row = (tile_row + 1) * TILE_ROWS < rows ? (tile_row + 1) * TILE_ROWS : rows;
    SHARED COUNTER histogram[8 * COPY];
    SHARED COUNTER not_finite;
    SHARED float parts[4][TILE_THREADS];
    SHARED float lows[8];
    SHARED float highs[8];
    for (int bin = THREAD; bin < 8 * COPY; bin += TILE_THREADS) SET(histogram[bin], 0);
    if (THREAD == 0) SET(not_finite, 0);
    float low = 3.4e38f, high = -3.4e38f, sum = 0.0f, square = 0.0f;
    int bad = 0;
    if (channel < channels) {
        for (int row = first_row; row < end_row; row += TILE_THREADS / 256) {
            const float value = (float)x[(size_t)row * channels + channel];
            const bool good = is_finite(value);
            low = good && value < low ? value : low;
            high = good && value > high ? value : high;
            sum += good ? value : 0.0f;
            square += good ? value * value : 0.0f;
            bad += good ? 0 : 1;
        }
    }
    parts[0][THREAD] = low;
    parts[1][THREAD] = high;
    parts[2][THREAD] = sum;
    parts[3][THREAD] = square;
    BARRIER;
    if (bad > 0) ADD(not_finite, bad);
    if (THREAD < 256) {
        for (int other = THREAD + 256; other < TILE_THREADS; other += 256) {
            low = parts[0][other] < low ? parts[0][other] : low;
            high = parts[1][other] > high ? parts[1][other] : high;
            sum += parts[2][other];
            square += parts[3][other];
        }
        if (channel < channels) {
            const int start = plan[input * 5 + 3] + tile_row * 4 * channels + channel;
            tile_limits[start] = low;
            tile_limits[start + channels] = high;
            tile_limits[start + 2 * channels] = sum;
            tile_limits[start + 3 * channels] = square;
        }
        low = lane_min(low);
        high = lane_max(high);
        if (THREAD % 32 == 0) {
            lows[THREAD / 32] = low;
            highs[THREAD / 32] = high;
        }
    }
    BARRIER;
    float tile_low = 0.0f, tile_high = 0.0f;
    for (int part = 0; part < 8; part++) {
        tile_low = lows[part] < tile_low ? lows[part] : tile_low;
        tile_high = highs[part] > tile_high ? highs[part] : tile_high;
    }
    const int exponent = grid_exponent(tile_low, tile_high);
    const float inverse_width = power_of_two(-exponent);
    const int first_bin = (int)floor(tile_low * inverse_width);
    const int copy = THREAD % 8 * COPY - first_bin;
    if (channel < channels) {
        for (int row = first_row; row < end_row; row += TILE_THREADS / 256) {
            const float value = (float)x[(size_t)row * channels + channel];
            if (is_finite(value)) ADD(histogram[copy + (int)floor(value * inverse_width)], 1);
        }
    }
    BARRIER;
    if (THREAD < 256) {
        int count = 0;
        for (int other = THREAD; other < 8 * COPY; other += COPY) count += (int)GET(histogram[other]);
        tile_histograms[GROUP * 259 + THREAD] = count;
    }
    if (THREAD == 0) {
        tile_histograms[GROUP * 259 + 256] = exponent;
        tile_histograms[GROUP * 259 + 257] = first_bin;
        tile_histograms[GROUP * 259 + 258] = (int)GET(not_finite);
    }
"""


# One group of 1024 threads reduces the tiles of one input to limits (2, channels), moments (2, channels) and a
# histogram (259,). The grids of the tiles' histograms nest in the input's grid, so no count is lost.
MERGE_KERNEL = """
    // Metal adds the attributes whose names stand here: thread_position_in_threadgroup, threadgroup_position_in_grid.
    const int input = GROUP, rows = plan[input * 5 + 1], channels = plan[input * 5 + 2];
    const int tile_rows = (rows + TILE_ROWS - 1) / TILE_ROWS, columns = (channels + 255) / 256;
    const int first_tile = plan[input * 5], end_tile = first_tile + tile_rows * columns;
    SHARED COUNTER merged[256];
    SHARED COUNTER not_finite;
    SHARED float lows[1024];
    SHARED float highs[1024];
    if (THREAD < 256) SET(merged[THREAD], 0);
    if (THREAD == 0) SET(not_finite, 0);
    float input_low = 0.0f, input_high = 0.0f;
    for (int channel = THREAD; channel < channels; channel += 1024) {
        float low = 3.4e38f, high = -3.4e38f, sum = 0.0f, square = 0.0f;
        for (int row = 0; row < tile_rows; row++) {
            const int start = plan[input * 5 + 3] + row * 4 * channels + channel;
            low = tile_limits[start] < low ? tile_limits[start] : low;
            high = tile_limits[start + channels] > high ? tile_limits[start + channels] : high;
            sum += tile_limits[start + 2 * channels];
            square += tile_limits[start + 3 * channels];
        }
        input_low = low < input_low ? low : input_low;
        input_high = high > input_high ? high : input_high;
        limits[plan[input * 5 + 4] + channel] = low;
        limits[total_channels + plan[input * 5 + 4] + channel] = high;
        moments[plan[input * 5 + 4] + channel] = sum / (float)rows;
        moments[total_channels + plan[input * 5 + 4] + channel] = square / (float)rows;
    }
    lows[THREAD] = input_low;
    highs[THREAD] = input_high;
    BARRIER;
    for (int size = 512; size > 0; size /= 2) {
        if (THREAD < size) {
            lows[THREAD] = lows[THREAD + size] < lows[THREAD] ? lows[THREAD + size] : lows[THREAD];
            highs[THREAD] = highs[THREAD + size] > highs[THREAD] ? highs[THREAD + size] : highs[THREAD];
        }
        BARRIER;
    }
    const int exponent = grid_exponent(lows[0], highs[0]);
    const int first_bin = (int)floor(lows[0] * power_of_two(-exponent));
    for (int tile = first_tile + THREAD / 256; tile < end_tile; tile += 4) {
        const int bin = THREAD % 256, count = tile_histograms[tile * 259 + bin];
        const int coarser = exponent - tile_histograms[tile * 259 + 256], shift = coarser < 31 ? coarser : 31;
        if (count > 0) ADD(merged[((tile_histograms[tile * 259 + 257] + bin) >> shift) - first_bin], count);
        if (bin == 0 && tile_histograms[tile * 259 + 258] > 0) ADD(not_finite, tile_histograms[tile * 259 + 258]);
    }
    BARRIER;
    if (THREAD < 256) histograms[input * 259 + THREAD] = (int)GET(merged[THREAD]);
    if (THREAD == 0) {
        histograms[input * 259 + 256] = exponent;
        histograms[input * 259 + 257] = first_bin;
        histograms[input * 259 + 258] = (int)GET(not_finite);
    }
"""
