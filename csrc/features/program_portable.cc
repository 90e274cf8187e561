// The program kernel for any processor. See program_code.h.
#define PENSTOCK_PROGRAM_KERNEL run_program_portable
#include "features/program_kernel.h"
