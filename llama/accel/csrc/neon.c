#define NAME(function) function##_neon
#include "layers.h"
#include "pack.h"
