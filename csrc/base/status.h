// The status type is public: this is its name inside the core.
#pragma once

#include "../../include/penstock/status.h"  // relative: for builds that know csrc/ alone
