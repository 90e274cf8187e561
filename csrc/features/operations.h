// The operations of a feature program: their numbers and the kinds of their operands.
#pragma once

#include <cstdint>

namespace penstock {

// Numbers are part of the program's bytes (penstock.features.program.SIGNATURES): append only.
enum FeatureOp : uint16_t {
  kAddF,
  kSubF,
  kMulF,
  kDivF,
  kNegF,
  kAbsF,
  kSqrtF,
  kFloorF,
  kCeilF,
  kMinF,
  kMaxF,
  kLtF,
  kLeF,
  kEqF,
  kAddI,
  kSubI,
  kMulI,
  kNegI,
  kAbsI,
  kMinI,
  kMaxI,
  kLtI,
  kLeI,
  kEqI,
  kAnd,
  kOr,
  kNot,
  kWhereF,
  kWhereI,
  kIsNullF,
  kIsNullI,
  kFillF,
  kFillI,
  kIntToF,
  kFToInt,
  kFToF32,
  kIntToBool,
  kFToBool,
  kMinute,
  kHour,
  kWeekday,
  kDay,
  kMonth,
  kIsinF,
  kIsinI,
  kRank,
  kFloorDivF,
  kModF,
  kFloorDivI,
  kModI,
  kSignF,
  kSignI,
  kRoundF,
  kExp,
  kExpm1,
  kExp2,
  kLog,
  kLog1p,
  kLog2,
  kLog10,
  kTanh,
  kPow,
  kIsNan,
  kBucketF,
  kBucketRightF,
  kBucketI,
  kBucketRightI,
  kSecond,
  kDayOfYear,
  kYear,
  kFloorTo,
  kWeekStart,
  kMonthStart,
  kYearStart,
  kHashI,
  kBucketOf,
  kFeatureOps,
};

// Result kind, then operand kinds: f float, i integer, s/t/r table of floats, of integers, of ranks.
constexpr const char* kSignatures[kFeatureOps] = {
    "fff", "fff", "fff", "fff", "ff", "ff", "ff", "ff", "ff", "fff", "fff", "iff", "iff", "iff", "iii", "iii",
    "iii", "ii", "ii", "iii", "iii", "iii", "iii", "iii", "iii", "iii", "ii", "fiff", "iiii", "if", "ii",
    "fff", "iii", "fi", "if", "ff", "ii", "if", "ii", "ii", "ii", "ii", "ii", "ifs", "iit", "ffr",
    // floor_div_f to round_f
    "fff", "fff", "iii", "iii", "ff", "ii", "ff",
    // exp to is_nan
    "ff", "ff", "ff", "ff", "ff", "ff", "ff", "ff", "fff", "if",
    // bucket_f to bucket_right_i
    "ifs", "ifs", "iit", "iit",
    // second to bucket_of
    "ii", "ii", "ii", "iii", "ii", "ii", "ii", "ii", "iii"};

// Fields and floors of a timestamp: times in one calendar bucket give one value.
constexpr bool is_calendar(FeatureOp op) {
  return (op >= kMinute && op <= kMonth) || (op >= kSecond && op <= kYearStart);
}

}  // namespace penstock
