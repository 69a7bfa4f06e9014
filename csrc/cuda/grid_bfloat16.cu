#include "grid_configs.h"

namespace fused_rin {
void append_bfloat16_grid_instances(std::vector<BlockInstance>& instances) {
  MmaGridConfigs<device::BFloat16>::append(instances);
}
}  // namespace fused_rin
