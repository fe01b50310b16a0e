/* A driver of CUDA without a device: it notes what is launched, and fails when told to.

   The libraries that ask it are the real ones. What it lacks they find missing, so that
   a test fails where they come to ask for more. Handles are addresses here, and memory
   is the host's. */

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int Result;
enum { SUCCESS, INVALID_CONTEXT = 201, NOT_FOUND = 500, MOST = 32 };

/* What tests set, and read. */
long stub_sizes[MOST];          /* bytes of the next launch's arguments, up to a 0 */
unsigned char stub_bytes[8 * MOST]; /* of the last one's, 8 for each */
long stub_launches, stub_device, stub_grid, stub_block, stub_stream;
long stub_waits, stub_taken;     /* of streams, and what was not given back */
int stub_capturing;
char stub_fails[64];            /* the name of a function, and its error */
int stub_error;

static char contexts[2], pool, kernel, library, event;
static void *current;

#define FAIL_IF_TOLD \
    if (strcmp(stub_fails, __func__) == 0) return stub_error

Result cuInit(unsigned flags) { FAIL_IF_TOLD; return SUCCESS; }
Result cuDriverGetVersion(int *version) { *version = 13000; return SUCCESS; }
Result cuDeviceGetCount(int *count) { *count = 2; return SUCCESS; }
Result cuDeviceGet(int *device, int ordinal) { *device = ordinal; return SUCCESS; }

Result cuDeviceGetAttribute(int *value, int attribute, int device) {
    FAIL_IF_TOLD;
    switch (attribute) {
        case 75: *value = 9; break; /* the compute capability: 9.0 */
        case 76: *value = 0; break;
        default: *value = 1;
    }
    return SUCCESS;
}

Result cuDevicePrimaryCtxRetain(void **context, int device) {
    FAIL_IF_TOLD;
    *context = &contexts[device];
    return SUCCESS;
}

Result cuDevicePrimaryCtxRelease_v2(int device) { return SUCCESS; }
Result cuCtxGetCurrent(void **context) {
    FAIL_IF_TOLD;
    *context = current;
    return SUCCESS;
}
Result cuCtxSetCurrent(void *context) { current = context; return SUCCESS; }
Result cuCtxPushCurrent_v2(void *context) { current = context; return SUCCESS; }
Result cuCtxPopCurrent_v2(void **context) {
    *context = current;
    current = 0;
    return SUCCESS;
}

Result cuCtxGetDevice(int *device) {
    if (!current) return INVALID_CONTEXT;
    *device = (int)((char *)current - contexts);
    return SUCCESS;
}

Result cuStreamGetCtx(void *stream, void **context) {
    *context = current;
    return SUCCESS;
}
Result cuStreamGetCtx_v2(void *stream, void **context, void **green) {
    *context = current;
    *green = 0;
    return SUCCESS;
}
Result cuStreamGetDevice(void *stream, int *device) { return cuCtxGetDevice(device); }
Result cuStreamGetFlags(void *stream, unsigned *flags) { *flags = 1; return SUCCESS; }
Result cuStreamIsCapturing(void *stream, int *status) {
    *status = stub_capturing;
    return SUCCESS;
}
Result cuStreamWaitEvent(void *stream, void *event_, unsigned flags) {
    FAIL_IF_TOLD;
    stub_waits++;
    return SUCCESS;
}
Result cuEventCreate(void **made, unsigned flags) { *made = &event; return SUCCESS; }
Result cuEventRecord(void *event_, void *stream) { return SUCCESS; }
Result cuEventDestroy_v2(void *event_) { return SUCCESS; }

Result cuDeviceGetDefaultMemPool(void **found, int device) {
    *found = &pool;
    return SUCCESS;
}
Result cuDeviceGetMemPool(void **found, int device) { *found = &pool; return SUCCESS; }
Result cuMemPoolGetAttribute(void *pool_, int attribute, void *value) {
    memset(value, 0, 8);
    return SUCCESS;
}
Result cuMemPoolSetAttribute(void *pool_, int attribute, void *value) {
    return SUCCESS;
}
Result cuMemAllocFromPoolAsync(void **memory, size_t size, void *pool_, void *stream) {
    FAIL_IF_TOLD;
    stub_taken++;
    *memory = aligned_alloc(512, (size + 511) / 512 * 512);
    return SUCCESS;
}
Result cuMemFreeAsync(void *memory, void *stream) {
    stub_taken--;
    free(memory);
    return SUCCESS;
}
Result cuPointerGetAttribute(void *value, int attribute, void *memory) {
    FAIL_IF_TOLD;
    memset(value, 0, 4);
    return SUCCESS;
}

Result cuLibraryLoadData(void **found, const void *code, void *a, void *b, unsigned c,
                         void *d, void *e, unsigned f) {
    FAIL_IF_TOLD;
    *found = &library;
    return SUCCESS;
}
Result cuLibraryUnload(void *library_) { return SUCCESS; }
Result cuLibraryGetKernel(void **found, void *library_, const char *name) {
    FAIL_IF_TOLD;
    *found = &kernel;
    return SUCCESS;
}

static Result launched(void *stream, unsigned grid, unsigned block, void **arguments) {
    stub_launches++;
    stub_device = current ? (char *)current - contexts : -1;
    stub_grid = grid;
    stub_block = block;
    stub_stream = (long)stream;
    memset(stub_bytes, 0, sizeof stub_bytes);
    for (int i = 0; i < MOST && stub_sizes[i]; i++)
        memcpy(stub_bytes + 8 * i, arguments[i], stub_sizes[i]);
    return SUCCESS;
}

Result cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned bx,
                      unsigned by, unsigned bz, unsigned shared, void *stream,
                      void **arguments, void **extra) {
    FAIL_IF_TOLD;
    return launched(stream, x * y * z, bx * by * bz, arguments);
}

struct config { unsigned x, y, z, bx, by, bz, shared; void *stream; };

Result cuLaunchKernelEx(const struct config *c, void *function, void **arguments,
                        void **extra) {
    FAIL_IF_TOLD;
    return launched(c->stream, c->x * c->y * c->z, c->bx * c->by * c->bz, arguments);
}

Result cuGetErrorName(Result error, const char **name) {
    *name = "CUDA_ERROR_STUB";
    return SUCCESS;
}
Result cuGetErrorString(Result error, const char **text) {
    *text = "told to fail";
    return SUCCESS;
}

Result cuGetProcAddress_v2(const char *name, void **found, int version,
                           unsigned long long flags, int *status) {
    char newer[128];
    Dl_info here;
    dladdr((void *)cuInit, &here);
    void *self = dlopen(here.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    snprintf(newer, sizeof newer, "%s_v2", name);
    *found = dlsym(self, newer);
    if (!*found) *found = dlsym(self, name);
    dlclose(self);
    if (status) *status = *found ? 0 : 1;
    return *found ? SUCCESS : NOT_FOUND;
}
