"""Source of the two GPU kernels that compute the statistics of a pass, the same text for Metal and CUDA."""

TILE_ROWS = 128
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
""",
}
KERNEL_FUNCTIONS = """
FUNCTION float power_of_two(int exponent) { return AS_FLOAT((exponent + 127) << 23); }

// calibration_store.histograms.histogram_grid: the finest power-of-two width at which [low, high] touches at most 256
// bins
FUNCTION int grid_exponent(float low, float high) {
    int exponent = ((AS_INT(high - low) >> 23) & 255) - 127 - 9;
    if (exponent < -24) exponent = -24;
    while (floor(high * power_of_two(-exponent)) - floor(low * power_of_two(-exponent)) > 255.0f) exponent++;
    return exponent;
}

FUNCTION bool is_finite(float value) { return (AS_INT(value) & 0x7f800000) != 0x7f800000; }
"""


# plan (inputs, 5) int32 holds for each input: the index of its first group, its rows, its channels, the offset of its
# part of tile_limits, and the offset of its part of limits and moments.
#
# One group of 1024 threads takes a tile, 256 channels × TILE_ROWS rows of one input, four rows at a time. The group
# reads the tile for its limits, and once more for the histogram over the tile's own grid. The second reading hits the
# cache, so x is read from memory once.
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
    SHARED COUNTER histogram[8 * 256];
    SHARED COUNTER not_finite;
    SHARED float lows[1024];
    SHARED float highs[1024];
    SHARED float sums[1024];
    SHARED float squares[1024];
    SET(histogram[THREAD], 0);
    SET(histogram[THREAD + 1024], 0);
    if (THREAD == 0) SET(not_finite, 0);
    BARRIER;
    float low = 3.4e38f, high = -3.4e38f, sum = 0.0f, square = 0.0f;
    int bad = 0;
    if (channel < channels) {
        for (int row = first_row; row < end_row; row += 4) {
            const float value = (float)x[(size_t)row * channels + channel];
            const bool good = is_finite(value);
            low = good && value < low ? value : low;
            high = good && value > high ? value : high;
            sum += good ? value : 0.0f;
            square += good ? value * value : 0.0f;
            bad += good ? 0 : 1;
        }
    }
    if (bad > 0) ADD(not_finite, bad);
    lows[THREAD] = low;
    highs[THREAD] = high;
    sums[THREAD] = sum;
    squares[THREAD] = square;
    BARRIER;
    for (int size = 512; size > 0; size /= 2) {
        if (THREAD < size) {
            lows[THREAD] = lows[THREAD + size] < lows[THREAD] ? lows[THREAD + size] : lows[THREAD];
            highs[THREAD] = highs[THREAD + size] > highs[THREAD] ? highs[THREAD + size] : highs[THREAD];
            sums[THREAD] += sums[THREAD + size];
            squares[THREAD] += squares[THREAD + size];
            if (size == 256 && channel < channels) {  // here index and channel agree
                const int start = plan[input * 5 + 3] + tile_row * 4 * channels + channel;
                tile_limits[start] = lows[THREAD];
                tile_limits[start + channels] = highs[THREAD];
                tile_limits[start + 2 * channels] = sums[THREAD];
                tile_limits[start + 3 * channels] = squares[THREAD];
            }
        }
        BARRIER;
    }
    const float tile_low = lows[0] < 0.0f ? lows[0] : 0.0f, tile_high = highs[0] > 0.0f ? highs[0] : 0.0f;
    const int exponent = grid_exponent(tile_low, tile_high);
    const float inverse_width = power_of_two(-exponent);
    const int first_bin = (int)floor(tile_low * inverse_width);
    const int copy = (THREAD / 32 % 8) * 256 - first_bin;
    if (channel < channels) {
        for (int row = first_row; row < end_row; row += 4) {
            const float value = (float)x[(size_t)row * channels + channel];
            if (is_finite(value)) ADD(histogram[copy + (int)floor(value * inverse_width)], 1);
        }
    }
    BARRIER;
    if (THREAD < 256) {
        int count = 0;
        for (int other = THREAD; other < 8 * 256; other += 256) count += (int)GET(histogram[other]);
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
