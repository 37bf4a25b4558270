// Which of our instruction sets this processor and its operating system support; built at baseline
// so that it can be imported anywhere. Order: best last.
// Without pybind11, whose headers alone would take a tenth of the whole build.
#include <Python.h>

#include <string>
#include <vector>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

// Linux hands out the AMX tile state on request only (Documentation/arch/x86/xstate.rst).
bool request_amx() {
    constexpr int kArchReqXcompPerm = 0x1023;
    constexpr int kXfeatureTileData = 18;
    return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) == 0;
}

bool cpuid_bit(unsigned leaf, unsigned subleaf, int reg, int bit) {
    unsigned r[4] = {};
    return __get_cpuid_count(leaf, subleaf, &r[0], &r[1], &r[2], &r[3]) && (r[reg] >> bit & 1);
}

std::vector<std::string> supported() {
    std::vector<std::string> isas;
    __builtin_cpu_init();  // checks the operating system's XCR0 as well
    if (!__builtin_cpu_supports("x86-64-v3")) return isas;
    isas.push_back("v3");
    if (!__builtin_cpu_supports("x86-64-v4")) return isas;
    isas.push_back("v4");
    constexpr int kEax = 0, kEdx = 3;
    if (!cpuid_bit(7, 1, kEax, 5)) return isas;
    isas.push_back("v4_bf16");
    if (cpuid_bit(7, 0, kEdx, 22) && cpuid_bit(7, 0, kEdx, 24) && request_amx())
        isas.push_back("v4_amx");
    return isas;
}

}  // namespace
#else
namespace {
std::vector<std::string> supported() { return {"base"}; }
}  // namespace
#endif

namespace {

PyObject* supported_list(PyObject*, PyObject*) {
    PyObject* list = PyList_New(0);
    for (const std::string& isa : supported()) {
        PyObject* name = list ? PyUnicode_FromString(isa.c_str()) : nullptr;
        if (!name || PyList_Append(list, name) != 0) Py_CLEAR(list);
        Py_XDECREF(name);
    }
    return list;
}

PyMethodDef methods[] = {
    {"supported", supported_list, METH_NOARGS, "names of usable instruction sets, best last"},
    {nullptr, nullptr, 0, nullptr}};
PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "_cpu_features",
    .m_doc = "instruction sets that both bigops and this machine have",
    .m_size = 0,
    .m_methods = methods,
    .m_slots = nullptr,
    .m_traverse = nullptr,
    .m_clear = nullptr,
    .m_free = nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__cpu_features() { return PyModule_Create(&definition); }
