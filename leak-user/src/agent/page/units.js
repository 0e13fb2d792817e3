// Numbers as people read them, in the words of the text view (`view::units`); a test holds the two together.

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];

// The divisor and name of the unit that fits; from 1000 on the next, so that no number has four digits.
function scale(value) {
  let divisor = 1;
  let unit = 0;
  while (Math.abs(value) / divisor >= 999.5 && unit + 1 < UNITS.length) {
    divisor *= 1024;
    unit += 1;
  }
  return [divisor, UNITS[unit]];
}

function digits(value) {
  const size = Math.abs(value);
  const whole = Number.isInteger(size) && (size >= 10 || size === 0);
  if (whole || size >= 99.95) return value.toFixed(0);
  return size >= 9.995 ? value.toFixed(1) : value.toFixed(2);
}

export function bytes(value) {
  const [divisor, unit] = scale(value);
  return `${digits(value / divisor)} ${unit}`;
}

// With the 95 % interval, in the same unit, where it is an estimate.
export function estimatedBytes(value, ci95) {
  if (!ci95) return bytes(value);
  const [divisor, unit] = scale(value);
  const [low, high] = ci95.map((bound) => digits(bound / divisor));
  return `~${digits(value / divisor)} ${unit} [${low}, ${high}]`;
}

export function count(value) {
  return String(value).replace(/\B(?=(\d{3})+$)/g, ",");
}

export function plural(n, word, words = `${word}s`) {
  return `${count(n)} ${n === 1 ? word : words}`;
}

export function estimatedPlural(n, ci95, word) {
  const text = plural(n, word);
  return ci95 ? `~${text} [${count(ci95[0])}, ${count(ci95[1])}]` : text;
}

// In the unit of time that makes the number neither tiny nor long.
export function rate(bytesPerS, ci95) {
  const size = Math.abs(bytesPerS);
  let [seconds, per] = [3600, "h"];
  if (size >= 100 * 1024) [seconds, per] = [1, "s"];
  else if (size * 60 >= 1024) [seconds, per] = [60, "min"];
  const [divisor, unit] = scale(bytesPerS * seconds);
  const number = (value) => {
    const text = digits((value * seconds) / divisor);
    return /[1-9]/.test(text) ? text : "0";
  };
  const value = `${number(bytesPerS)} ${unit}/${per}`;
  if (!ci95) return value;
  let [from, to] = ci95.map(number);
  // A narrow interval needs more digits, or it would look like none.
  if (from === to && ci95[0] < ci95[1]) [from, to] = ci95.map((bound) => ((bound * seconds) / divisor).toFixed(2));
  return `${value} [${from}, ${to}]`;
}

export function duration(seconds) {
  if (!Number.isFinite(seconds) || seconds < 0) return "?";
  if (seconds < 9.95 && !Number.isInteger(seconds)) return `${seconds.toFixed(1)} s`;
  const total = Math.round(seconds);
  if (total < 60) return `${total} s`;
  let parts = [Math.floor(total / 86400), "d", Math.floor((total % 86400) / 3600), "h"];
  if (total < 3600) parts = [Math.floor(total / 60), "min", total % 60, "s"];
  else if (total < 86400) parts = [Math.floor(total / 3600), "h", Math.floor((total % 3600) / 60), "min"];
  const [large, largeUnit, small, smallUnit] = parts;
  return small === 0 ? `${large} ${largeUnit}` : `${large} ${largeUnit} ${small} ${smallUnit}`;
}

// A time to come, as far as an estimate is worth saying: two digits of it.
export function about(seconds) {
  const steps = [[60, 5], [600, 30], [3600, 60], [36000, 600], [172800, 3600]];
  const step = (steps.find(([below]) => seconds < below) ?? [0, 86400])[1];
  return duration(Math.max(Math.round(seconds / step) * step, step));
}

// The time of day here, with the day where that is not today's.
export function clock(date, now = new Date()) {
  const two = (n) => String(n).padStart(2, "0");
  const time = `${two(date.getHours())}:${two(date.getMinutes())}`;
  if (date.toDateString() === now.toDateString()) return time;
  return `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())} ${time}`;
}
