// Runs the CUDA kernels on the CPU, one thread after another.

#define BATCHLINE_NATIVE
#include "../../batchline/src/backend/cuda/kernels.cu"

#include <cstring>
#include <utility>

namespace {

template <class... A, std::size_t... I>
void spread(void (*kernel)(A...), void *const *parameters, std::index_sequence<I...>) {
    kernel(*(A *)parameters[I]...);
}

template <class... A>
void apply(void (*kernel)(A...), void *const *parameters) {
    spread(kernel, parameters, std::index_sequence_for<A...>());
}

template <auto KERNEL_FUNCTION>
void call(void *const *parameters) {
    apply(KERNEL_FUNCTION, parameters);
}

struct Entry {
    const char *name;
    void (*call)(void *const *parameters);
};

#define ENTRY(NAME) {#NAME, call<NAME>}
const Entry entries[] = {
    ENTRY(batchline_fill_u64),
    ENTRY(batchline_convert),
    ENTRY(batchline_convert_u8_f32),
    ENTRY(batchline_convert_u8_f16),
    ENTRY(batchline_convert_u8_bf16),
    ENTRY(batchline_convert_i8_f32),
    ENTRY(batchline_convert_i8_f16),
    ENTRY(batchline_convert_i8_bf16),
    ENTRY(batchline_convert_f16_f32),
    ENTRY(batchline_convert_f16_f16),
    ENTRY(batchline_convert_f16_bf16),
    ENTRY(batchline_convert_f32_f32),
    ENTRY(batchline_convert_f32_f16),
    ENTRY(batchline_convert_f32_bf16),
    ENTRY(batchline_gather_rows),
    ENTRY(batchline_gather_convert_u8_f32),
    ENTRY(batchline_gather_convert_u8_f16),
    ENTRY(batchline_gather_convert_u8_bf16),
};

} // namespace

// Whether there is a kernel of this name. Without parameters it is not run.
extern "C" bool batchline_native_launch(const char *name, const u32 *grid, const u32 *block,
                                        void *const *parameters) {
    for (const Entry &entry : entries) {
        if (std::strcmp(entry.name, name) != 0) continue;
        if (parameters == nullptr) return true;
        native_grid_size = {grid[0], grid[1]};
        native_block_size = {block[0], block[1]};
        for (u32 by = 0; by < grid[1]; ++by) {
            for (u32 bx = 0; bx < grid[0]; ++bx) {
                native_block = {bx, by};
                for (u32 ty = 0; ty < block[1]; ++ty) {
                    for (u32 tx = 0; tx < block[0]; ++tx) {
                        native_thread = {tx, ty};
                        entry.call(parameters);
                    }
                }
            }
        }
        return true;
    }
    return false;
}
