#include "block_configs.h"

namespace fused_rin {
void append_float16_unit_instances(std::vector<BlockInstance>& instances) {
  MmaUnitConfigs<device::Float16>::append(instances);
}
}  // namespace fused_rin
