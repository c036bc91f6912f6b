#define NAME(function) function##_avx512bf16
#include "attention.h"
#include "half.h"
#include "pack.h"
#include "quantized.h"
