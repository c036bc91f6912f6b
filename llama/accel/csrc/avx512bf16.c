#define NAME(function) function##_avx512bf16
#include "layers.h"
#include "pack.h"
