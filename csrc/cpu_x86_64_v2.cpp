#define PYFUSED_MODULE _cpu_x86_64_v2
#include "bindings.cpp"
