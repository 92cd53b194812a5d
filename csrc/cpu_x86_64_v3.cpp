#define PYFUSED_MODULE _cpu_x86_64_v3
#include "bindings.cpp"
