#define NAME(function) function##_avx512
#include "layers.h"
#include "pack.h"
