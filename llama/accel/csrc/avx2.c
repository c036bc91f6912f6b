#define NAME(function) function##_avx2
#include "layers.h"
#include "pack.h"
