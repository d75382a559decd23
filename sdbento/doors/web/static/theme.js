// Before the page is drawn, so that it does not flash: the colours that the user has chosen.
"use strict";

try {
  document.documentElement.dataset.theme = JSON.parse(localStorage.getItem("sdbento.theme")) ?? "auto";
} catch {
  document.documentElement.dataset.theme = "auto";
}
