// SPDX-License-Identifier: Apache-2.0
export const NUM_COLOURS = 6; // of forwards: --tint-0 to --tint-5 in theme.css
