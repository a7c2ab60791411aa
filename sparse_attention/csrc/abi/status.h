// status.h — how checks of arguments answer.
#ifndef SPARSE_ATTENTION_ABI_STATUS_H_
#define SPARSE_ATTENTION_ABI_STATUS_H_

#include <stdarg.h>
#include <stdio.h>

#include "abi/core.h"

namespace spattn {

using LongLong = long long;  // what %lld prints, whatever int64_t is

inline SpattnStatus Ok() { return {SPATTN_OK, ""}; }

__attribute__((format(printf, 2, 3))) inline SpattnStatus Failed(SpattnCode code,
                                                                 const char* format, ...) {
  SpattnStatus status = {code, ""};
  va_list args;
  va_start(args, format);
  vsnprintf(status.message, sizeof(status.message), format, args);
  va_end(args);
  return status;
}

}  // namespace spattn

#define SPATTN_RETURN_IF(condition, ...)                                          \
  do {                                                                            \
    if (condition) return ::spattn::Failed(SPATTN_INVALID_ARGUMENT, __VA_ARGS__); \
  } while (false)

#define SPATTN_RETURN_IF_ERROR(expression)         \
  do {                                             \
    const SpattnStatus status_ = (expression);     \
    if (status_.code != SPATTN_OK) return status_; \
  } while (false)

#endif  // SPARSE_ATTENTION_ABI_STATUS_H_
