#define PYFUSED_MODULE _cpu_generic
#include "bindings.cpp"
