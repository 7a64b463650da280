// The kernels that no engine has. `python tools/compile_kernels.py` compiles them to kernels.ptx, which the driver compiles for
// its card: no device needs NVRTC. Not yet run on a GPU.

// Bins of a distribution, by how likely a token is; tokens whose weights are added up first. kernels.py has both.
#define BINS 512
#define PART 512
#define FINE 32.0f

// No library defines cudaGraphSetConditional: the driver resolves it when it loads the module, as XLA's PTX has it.
typedef __device_builtin__ unsigned long long cudaGraphConditionalHandle;
extern "C" __device__ __cudart_builtin__ void cudaGraphSetConditional(
    cudaGraphConditionalHandle handle, unsigned int value);

// Compares in double, as the host does. A unit's handles: run, skip.
extern "C" __global__ void decide(const float* damage, const double* limit, bool* skipped,
    const cudaGraphConditionalHandle* handles, int units, int numbers)
{
    for (int unit = threadIdx.x; unit < units; unit += blockDim.x) {
        bool skips = true;
        for (int at = unit; at < numbers; at += units) skips &= (double)damage[at] < limit[at];
        skipped[unit] = skips;
        cudaGraphSetConditional(handles[2 * unit], !skips);
        cudaGraphSetConditional(handles[2 * unit + 1], skips);
    }
}

// A block per new token, layer's K or V, and head; rows are of two-byte elements at least. A pair: the first of its
// tables, and new rows of so many tokens of each sequence.
extern "C" __global__ void write_rows(
    short* const* pairs, const long long* position, int tokens, long long width, long long pitch)
{
    const long long table = (long long)(blockIdx.x / tokens) * gridDim.z + blockIdx.z;
    short* row = pairs[2 * blockIdx.y] + table * pitch + position[blockIdx.x] * width;
    const short* rows = pairs[2 * blockIdx.y + 1] + (table * tokens + blockIdx.x % tokens) * width;
    for (long long i = threadIdx.x; i < width; i += blockDim.x) row[i] = rows[i];
}

// A row of blocks per sequence. `best` is zero, and gets the largest logit, as bits that are ordered as numbers are,
// before the number of its token, counted down: of equals the first wins, as in numpy. -0 + 0 is 0, which equals it.
extern "C" __global__ void likeliest(const float* logits, unsigned long long* best, int vocab)
{
    unsigned long long largest = 0;
    for (int token = blockIdx.x * blockDim.x + threadIdx.x; token < vocab; token += gridDim.x * blockDim.x) {
        const unsigned int bits = __float_as_uint(logits[(long long)blockIdx.y * vocab + token] + 0.0f);
        const unsigned int ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
        const unsigned long long found = (unsigned long long)ordered << 32 | (unsigned int)(0x7fffffff - token);
        if (found > largest) largest = found;
    }
    atomicMax(best + blockIdx.y, largest);
}

__device__ int token_of(unsigned long long best) { return 0x7fffffff - (int)(unsigned int)best; }

// How far a logit is below the largest, over the temperature: its weight is e to the minus that. Bins of 1 / FINE.
struct Draw { double sharpness, top_k, top_p, lowest, share; };

__device__ float below(const float* logits, unsigned long long best, const Draw& draw, int token)
{
    return (logits[token_of(best)] - logits[token]) * (float)draw.sharpness;
}

// A row of blocks per sequence. A bin gets the sum of its weights, and their number.
extern "C" __global__ void weigh(const float* logits, const unsigned long long* best, const Draw* draws, float* bins,
    int vocab)
{
    const Draw& draw = draws[blockIdx.y];
    if (!draw.sharpness) return;
    for (int token = blockIdx.x * blockDim.x + threadIdx.x; token < vocab; token += gridDim.x * blockDim.x) {
        const float far = below(logits + (long long)blockIdx.y * vocab, best[blockIdx.y], draw, token) * FINE;
        if (!(far < BINS)) continue;
        float* bin = bins + 2 * (BINS * blockIdx.y + (int)far);
        atomicAdd(bin, __expf(far / -FINE));
        atomicAdd(bin + 1, 1.0f);
    }
}

// How many bins top-k, top-p and min-p leave: the last of them whole.
__device__ int bins_left(const float* bins, const Draw& draw)
{
    int left = BINS, last = 0;
    float count = 0, mass = 0, sum = 0;
    if (draw.top_k) for (left = 0; left < BINS && count < draw.top_k; left++) count += bins[2 * left + 1];
    for (int bin = 0; bin < left; bin++) mass += bins[2 * bin];
    for (; last < left && sum < draw.top_p * mass; last++) sum += bins[2 * last];
    return draw.lowest * FINE + 1 < last ? (int)(draw.lowest * FINE) + 1 : last;
}

// A row of blocks per sequence, a block per PART tokens: the sum of the weights that are left.
extern "C" __global__ void add_up(const float* logits, const unsigned long long* best, const Draw* draws,
    const float* bins, float* parts, int vocab)
{
    const Draw& draw = draws[blockIdx.y];
    if (!draw.sharpness) return;
    const int left = bins_left(bins + 2 * BINS * blockIdx.y, draw);
    float sum = 0;
    for (int token = blockIdx.x * PART + threadIdx.x; token < vocab && token < (blockIdx.x + 1) * PART;
         token += blockDim.x) {
        const float far = below(logits + (long long)blockIdx.y * vocab, best[blockIdx.y], draw, token) * FINE;
        if (far < left) sum += __expf(far / -FINE);
    }
    atomicAdd(parts + gridDim.x * blockIdx.y + blockIdx.x, sum);
}

// A thread per sequence. The token at which the running sum of the weights that are left passes the share of all.
extern "C" __global__ void follow(const float* logits, unsigned long long* best, const Draw* draws, float* bins,
    float* parts, long long* ids, long long* positions, int vocab)
{
    const Draw& draw = draws[threadIdx.x];
    const int number = (vocab + PART - 1) / PART;
    int token = token_of(best[threadIdx.x]);
    logits += (long long)threadIdx.x * vocab, bins += 2 * BINS * threadIdx.x, parts += number * threadIdx.x;
    if (draw.sharpness) {
        const int left = bins_left(bins, draw);
        float sum = 0;
        for (int part = 0; part < number; part++) sum += parts[part];
        sum *= (float)draw.share;
        int part = 0;
        while (part < number - 1 && sum >= parts[part]) sum -= parts[part++];
        for (int at = part * PART; at < vocab && sum >= 0; at++) {
            const float far = below(logits, best[threadIdx.x], draw, at) * FINE;
            if (far < left) sum -= __expf(far / -FINE), token = at;
        }
        for (int bin = 0; bin < 2 * BINS; bin++) bins[bin] = 0;
        for (int part = 0; part < number; part++) parts[part] = 0;
    }
    ids[threadIdx.x] = token;
    positions[threadIdx.x] += 1;
    best[threadIdx.x] = 0;
}
