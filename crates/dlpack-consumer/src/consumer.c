/* A program that takes tensors through DLPack. What it knows of the structures it knows from the
 * standard (version 1.3) alone, and nothing from batchline. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

struct device {
    int32_t type;
    int32_t number;
};

struct element {
    uint8_t code;
    uint8_t bits;
    uint16_t lanes;
};

struct tensor {
    void *data;
    struct device device;
    int32_t ndim;
    struct element element;
    int64_t *shape;
    int64_t *strides;
    uint64_t byte_offset;
};

/* Before version 1.0. */
struct legacy {
    struct tensor tensor;
    void *context;
    void (*deleter)(struct legacy *);
};

struct versioned {
    uint32_t major;
    uint32_t minor;
    void *context;
    void (*deleter)(struct versioned *);
    uint64_t flags;
    struct tensor tensor;
};

/* The layout that the standard's compilers give it on the machines that this runs on. */
_Static_assert(sizeof(void *) != 8 || sizeof(struct tensor) == 48, "the tensor");
_Static_assert(sizeof(void *) != 8 || sizeof(struct legacy) == 64, "the old structure");
_Static_assert(sizeof(void *) != 8 || sizeof(struct versioned) == 80, "the structure");

enum { MOST = 8 };

/* What is said of a tensor. */
struct seen {
    uint32_t major;
    uint32_t minor;
    uint64_t flags;
    int32_t device_type;
    int32_t device_number;
    uint8_t code;
    uint8_t bits;
    uint16_t lanes;
    int32_t ndim;
    int64_t shape[MOST];
    int64_t strides[MOST];
    const void *data;
    uint64_t byte_offset;
};

static const struct tensor *tensor_of(const void *managed, int is_legacy) {
    return is_legacy ? &((const struct legacy *)managed)->tensor
                     : &((const struct versioned *)managed)->tensor;
}

/* Fails where a rule is broken that all tensors obey. */
int dlpack_consumer_look(const void *managed, int is_legacy, struct seen *seen) {
    memset(seen, 0, sizeof *seen);
    if (!is_legacy) {
        const struct versioned *versioned = managed;
        /* Of another major version nothing may be looked at but the deleter. */
        if (versioned->major != 1)
            return -1;
        seen->major = versioned->major;
        seen->minor = versioned->minor;
        seen->flags = versioned->flags;
    }
    const struct tensor *tensor = tensor_of(managed, is_legacy);
    if (tensor->ndim < 0 || tensor->ndim > MOST)
        return -2;
    if (tensor->ndim > 0 && (tensor->shape == NULL || tensor->strides == NULL))
        return -3;
    seen->device_type = tensor->device.type;
    seen->device_number = tensor->device.number;
    seen->code = tensor->element.code;
    seen->bits = tensor->element.bits;
    seen->lanes = tensor->element.lanes;
    seen->ndim = tensor->ndim;
    for (int32_t dim = 0; dim < tensor->ndim; dim++) {
        seen->shape[dim] = tensor->shape[dim];
        seen->strides[dim] = tensor->strides[dim];
    }
    seen->data = tensor->data;
    seen->byte_offset = tensor->byte_offset;
    return 0;
}

/* Copies the elements of a tensor on the host, each found by its indices; returns the bytes, or -1
 * where there is no room for them. */
int64_t dlpack_consumer_read(const void *managed, int is_legacy, unsigned char *to, size_t room) {
    const struct tensor *tensor = tensor_of(managed, is_legacy);
    const size_t size = ((size_t)tensor->element.bits * tensor->element.lanes + 7) / 8;
    int64_t indices[MOST] = {0};
    size_t copied = 0;
    for (int32_t dim = 0; dim < tensor->ndim; dim++)
        if (tensor->shape[dim] == 0)
            return 0;
    for (;;) {
        int64_t place = 0;
        for (int32_t dim = 0; dim < tensor->ndim; dim++)
            place += indices[dim] * tensor->strides[dim];
        if (room - copied < size)
            return -1;
        const unsigned char *first = (const unsigned char *)tensor->data + tensor->byte_offset;
        memcpy(to + copied, first + place * (int64_t)size, size);
        copied += size;
        int32_t dim = tensor->ndim - 1;
        while (dim >= 0 && ++indices[dim] == tensor->shape[dim])
            indices[dim--] = 0;
        if (dim < 0)
            return (int64_t)copied;
    }
}

void dlpack_consumer_end(void *managed, int is_legacy) {
    if (is_legacy) {
        struct legacy *legacy = managed;
        if (legacy->deleter != NULL)
            legacy->deleter(legacy);
    } else {
        struct versioned *versioned = managed;
        if (versioned->deleter != NULL)
            versioned->deleter(versioned);
    }
}
