// A CUDA driver that computes nothing and copies nothing: what is left is the host's own time per
// batch, which can be measured and profiled without a GPU. Its clock runs like that of a GPU: each
// stream is busy for a while with each piece of work, waits for events, and events pass when their
// time has come. See ../README.md.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef unsigned Code;
typedef void *Handle;
typedef uint64_t Address;

enum { NOT_READY = 600, STREAMS = 4096 };
// Nanoseconds: of a kernel, of a copy beside its bytes; bytes per nanosecond over the link.
static const uint64_t KERNEL = 3000, COPY = 2000, RATE = 55;

// When each stream is done with what it has, by its handle.
static _Atomic uint64_t busy[STREAMS];
static _Atomic uintptr_t handles = 16;

static uint64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static void work(Handle stream, uint64_t time) {
    _Atomic uint64_t *until = &busy[(uintptr_t)stream % STREAMS];
    uint64_t moment = now();
    *until = (*until > moment ? *until : moment) + time;
}

#define NOTHING(name, ...) \
    Code name(__VA_ARGS__) { return 0; }
#define WORK(name, time, ...) \
    Code name(__VA_ARGS__) { \
        work(stream, time); \
        return 0; \
    }

NOTHING(cuInit, unsigned flags)
NOTHING(cuDevicePrimaryCtxRelease_v2, int device)
NOTHING(cuStreamDestroy_v2, Handle stream)
NOTHING(cuEventDestroy_v2, Handle event)
NOTHING(cuMemHostRegister_v2, Handle start, size_t bytes, unsigned flags)
NOTHING(cuMemHostUnregister, Handle start)
NOTHING(cuModuleUnload, Handle module)
NOTHING(cuThreadExchangeStreamCaptureMode, unsigned *mode)

Code cuDriverGetVersion(int *version) { *version = 13000; return 0; }
Code cuGetErrorName(Code code, const char **text) { *text = "NULL_DRIVER"; return 0; }
Code cuGetErrorString(Code code, const char **text) { *text = "the null driver"; return 0; }
Code cuDeviceGetCount(int *count) { *count = 1; return 0; }
Code cuDeviceGet(int *device, int ordinal) { *device = ordinal; return ordinal ? 101 : 0; }
Code cuDeviceGetName(char *name, int len, int device) { strncpy(name, "null", len); return 0; }
Code cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = (size_t)64 << 30; return 0; }
Code cuDeviceGetPCIBusId(char *id, int len, int device) { strncpy(id, "0000:00:00.0", len); return 0; }
Code cuDeviceGetAttribute(int *value, int attribute, int device) {
    // Multiprocessors and compute capability as an H100 has them; all that is asked for is there.
    *value = attribute == 16 ? 132 : attribute == 75 ? 9 : attribute == 76 ? 0 : 1;
    return 0;
}

static _Thread_local Handle current;
Code cuDevicePrimaryCtxRetain(Handle *context, int device) { *context = (Handle)1; return 0; }
Code cuCtxGetCurrent(Handle *context) { *context = current; return 0; }
Code cuCtxSetCurrent(Handle context) { current = context; return 0; }
Code cuCtxPushCurrent_v2(Handle context) { current = context; return 0; }
Code cuCtxPopCurrent_v2(Handle *context) { *context = current; current = NULL; return 0; }

Code cuStreamCreateWithPriority(Handle *stream, unsigned flags, int priority) {
    *stream = (Handle)++handles;
    return 0;
}
Code cuStreamSynchronize(Handle stream) {
    while (now() < busy[(uintptr_t)stream % STREAMS]) {}
    return 0;
}
Code cuStreamIsCapturing(Handle stream, int *status) { *status = 0; return 0; }
// An event is the time at which it passes.
Code cuEventCreate(Handle *event, unsigned flags) { *event = calloc(1, sizeof(uint64_t)); return 0; }
Code cuEventRecord(Handle event, Handle stream) {
    work(stream, 0);
    *(_Atomic uint64_t *)event = busy[(uintptr_t)stream % STREAMS];
    return 0;
}
Code cuEventQuery(Handle event) { return now() < *(_Atomic uint64_t *)event ? NOT_READY : 0; }
Code cuStreamWaitEvent(Handle stream, Handle event, unsigned flags) {
    uint64_t time = *(_Atomic uint64_t *)event;
    _Atomic uint64_t *until = &busy[(uintptr_t)stream % STREAMS];
    if (*until < time) *until = time;
    return 0;
}

Code cuMemAlloc_v2(Address *address, size_t bytes) {
    Handle start;
    Code code = posix_memalign(&start, 256, bytes) ? 2 : 0;
    *address = (Address)start;
    return code;
}
Code cuMemFree_v2(Address address) { free((Handle)address); return 0; }
Code cuMemHostAlloc(Handle *start, size_t bytes, unsigned flags) {
    return posix_memalign(start, 4096, bytes) ? 2 : 0;
}
Code cuMemFreeHost(Handle start) { free(start); return 0; }
Code cuMemHostGetDevicePointer_v2(Address *address, Handle start, unsigned flags) {
    *address = (Address)start;
    return 0;
}
Code cuModuleLoadData(Handle *module, const void *image) { *module = (Handle)1; return 0; }
Code cuModuleGetFunction(Handle *function, Handle module, const char *name) {
    *function = (Handle)1;
    return 0;
}

WORK(cuMemcpyHtoDAsync_v2, COPY + bytes / RATE, Address to, Handle from, size_t bytes, Handle stream)
WORK(cuMemcpyDtoHAsync_v2, COPY + bytes / RATE, Handle to, Address from, size_t bytes, Handle stream)
WORK(cuMemcpyDtoDAsync_v2, KERNEL, Address to, Address from, size_t bytes, Handle stream)
WORK(cuMemsetD8Async, KERNEL, Address to, unsigned char value, size_t count, Handle stream)
WORK(cuMemsetD16Async, KERNEL, Address to, unsigned short value, size_t count, Handle stream)
WORK(cuMemsetD32Async, KERNEL, Address to, unsigned value, size_t count, Handle stream)
WORK(cuLaunchKernel, KERNEL, Handle function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
     unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared, Handle stream,
     Handle *parameters, Handle *extra)
Code cuMemcpyBatchAsync_v2(Address *to, Address *from, size_t *sizes, size_t count, Handle attributes,
                           size_t *places, size_t attribute_count, Handle stream) {
    uint64_t bytes = 0;
    for (size_t copy = 0; copy < count; ++copy) bytes += sizes[copy];
    work(stream, COPY + bytes / RATE);
    return 0;
}
Code cuGetProcAddress_v2(const char *name, Handle *entry, int version, uint64_t flags, int *status) {
    *entry = strcmp(name, "cuMemcpyBatchAsync") ? NULL : (Handle)cuMemcpyBatchAsync_v2;
    if (status) *status = *entry ? 0 : 1;
    return *entry ? 0 : 500;
}
