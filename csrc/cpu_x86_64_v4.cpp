#define PYFUSED_MODULE _cpu_x86_64_v4
#include "bindings.cpp"
