#define NAME(function) function##_neon
#include "attention.h"
#include "half.h"
#include "pack.h"
#include "quantized.h"
