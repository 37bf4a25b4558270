// The entry point of one instruction set's module: Python finds it by the module's name.
#include <Python.h>

#define BIGOPS_JOIN(a, b) a##b
#define BIGOPS_INIT(name) BIGOPS_JOIN(PyInit_, name)
#define BIGOPS_TEXT_OF(x) #x
#define BIGOPS_TEXT(x) BIGOPS_TEXT_OF(x)

extern "C" PyObject* bigops_create_module(const char* name);

PyMODINIT_FUNC BIGOPS_INIT(BIGOPS_MODULE_NAME)(void) {
    return bigops_create_module(BIGOPS_TEXT(BIGOPS_MODULE_NAME));
}
